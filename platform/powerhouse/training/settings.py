"""The settings that parts of a run share: values, without a word of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from powerhouse.config import Config, StoragePath, storage_root

METRICS, SAMPLES, STARTS, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "starts.jsonl", "tensorboard"
"""What a run leaves in its folder of what was seen of it."""


class OptimConfig(Config):
    """The optimiser, under a schedule with warm-up."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: Loshchilov and Hutter 2019. muon: the blocks' matrices by Muon (Jordan et al. 2024), the rest by AdamW, all at
    the same rate."""

    lr: float = Field(gt=0)
    """Highest learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly to `lr`."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: half a cosine down (Loshchilov and Hutter 2017). wsd: stable at `lr`, then a straight line down, so that a run
    can be prolonged from before its decay (Hu et al. 2024, section 4)."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps over which wsd decays."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """The rate falls to this fraction of `lr` at the last step."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices; norms are not decayed."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared gradient's mean."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Longest gradient, in the 2-norm over all parameters."""
    skip_spikes_sigma: float | None = Field(default=None, gt=0)
    """Skip a step whose loss or gradient norm is this many standard deviations above the mean of the newest steps; 6 is usual
    (OLMo Team 2024). None: skip none."""
    spike_window_steps: int = Field(default=128, ge=4)
    """How many newest steps those are; nothing is skipped before half as many are known."""
    loss_scale: float = Field(default=16.0, gt=0)
    """float16: the first scale of the loss, which is a sum over tokens; halved at each overflow, and that step skipped."""
    loss_scale_growth_steps: int = Field(default=2000, gt=0)
    """float16: steps without an overflow after which the scale is doubled."""


class RunConfig(Config):
    """How the work is spread and saved: it changes the speed, not the result, so a resumed run may change it."""

    num_workers: int = Field(default=1, gt=0)
    """Training processes; the model is sharded over them."""
    min_workers: int | None = Field(default=None, gt=0)
    """Fewest workers to go on with while the cluster has no room for `num_workers`; by default none fewer. The global batch
    stays the same: each worker takes more of it. Of a number that cannot share it the surplus workers stay idle."""
    workers_per_copy: int | None = Field(default=None, gt=0)
    """Workers that hold one copy of the model between them; all by default. Fewer, such as the GPUs of a node: several copies,
    whose gradients are summed once a step (hybrid sharding). 1: plain replication."""
    accumulate: Literal["sharded", "deferred"] = "sharded"
    """When the workers of a copy sum their gradients. sharded: after each micro-batch; each keeps its slice. deferred: once a
    step; less traffic, and each holds the whole gradient in float32 until then."""
    micro_batch_rows: int = Field(gt=0)
    """Rows in one forward pass of one worker; the rest of the global batch is accumulated."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs asked of Ray for a worker; also its number of torch threads, at least one."""
    use_gpu: bool = False
    """A GPU for each worker, and nccl instead of gloo."""
    rows: str | None = None
    """URI of a copy of the tokens' rows/ in an object store, such as s3://bucket/tokens/rows; each machine that reads rows
    fetches it once, to its own disk. null: rows are read in the tokens' folder."""
    checkpoint_every: int = Field(default=100, gt=0)
    """Steps between two checkpoints; the last step is always saved."""
    checkpoints: Annotated[str, AfterValidator(lambda name: name if "://" in name else str(storage_root() / name))] | None = (
        None
    )
    """Where checkpoints lie: a path, or a URI such as s3://bucket/runs/a; by default in the output folder."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints that are kept; where one is damaged, the run goes on from the one before it."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it. full: a block's inside, all but its input (Chen et al.
    2016): least memory, about a third more work. selective: all but the results of matrix products and of attention."""
    compiles_blocks: bool = False
    """Compile each block with torch.compile: faster on a GPU, after a first step of minutes."""
    loss_chunk_tokens: int | None = Field(default=None, gt=0)
    """Tokens whose logits are in memory at once, and computed again in the backward pass; None: all of a micro-batch."""
    max_failures: int = Field(default=2, ge=0)
    """How often lost workers are replaced before the run gives up."""

    @model_validator(mode="after")
    def _has_a_range(self) -> RunConfig:
        if self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers up to num_workers, which is {self.num_workers}")
        return self

    @property
    def worker_counts(self) -> dict[str, int]:
        """Most and fewest workers of the run, by the name of the setting."""
        return {"run.num_workers": self.num_workers, "run.min_workers": self.min_workers or self.num_workers}


class NoiseConfig(Config):
    """Gaps to fill: BERT's masked tokens (Devlin et al. 2019), T5's corrupted spans (Raffel et al. 2020)."""

    share: float = Field(default=0.15, gt=0, lt=1)
    """Share of a row's tokens that are hidden."""
    mean_span: float = Field(default=3.0, ge=1)
    """Mean length of a hidden span of a T5, in tokens."""


class MlflowConfig(Config):
    """An MLflow server, or whatever else a tracking URI can name."""

    tracking_uri: str = Field(min_length=1)
    """Such as http://mlflow.example:5000."""
    experiment: str = "powerhouse"
    """Made where it is not there."""
    run_name: str | None = None
    """By default the name of the output folder."""


class WatchConfig(Config):
    """What is seen of a run while it goes on; it changes neither the result nor what the result is known by."""

    log_every: int = Field(default=1, gt=0)
    """Steps between two lines of metrics.jsonl, and of all that shows the same."""
    tensorboard: bool = True
    """Event files in the output's tensorboard/, for `tensorboard --logdir`."""
    mlflow: MlflowConfig | None = None
    """Where an MLflow run is told of the same; needs the extra `mlflow`."""
    look_every: int = Field(default=100, gt=0)
    """Steps between two looks at held-out text and at samples; the last step is looked at too."""
    heldout: StoragePath | None = None
    """Corpus artifact whose held-out documents are scored: a decoder in bits per byte, an encoder or a T5 in nats per token
    that it fills in. Or tokens, made as the run's own of conversations or pairs kept aside: nats per token of an answer."""
    num_heldout: int = Field(default=64, gt=0)
    """Documents, or rows, of it that are scored: the first."""
    prompts: tuple[str, ...] = ()
    """Texts that a decoder goes on from, or that a T5 answers, taking the likeliest token each time."""
    sample_tokens: int = Field(default=40, gt=0)
    """Tokens that it goes on for."""
    declared_watts: float | None = Field(default=None, gt=0)
    """Power of a worker's device, for the energy where neither NVML nor RAPL measures it."""
    grid_g_per_kwh: float | None = Field(default=None, ge=0)
    """Grams of CO2 equivalent for a kilowatt-hour where the nodes stand; without it there is no CO2 figure."""
