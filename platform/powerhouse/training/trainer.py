"""Ray Train's trainer, with no process that this house has no use for and no torch where only workers need it. [Ray]

Ray's controller loads this module, and with it nothing that only the workers need.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from powerhouse.errors import PowerhouseError

if TYPE_CHECKING:
    from powerhouse.training.config import TrainingConfig


class Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray Train is not typed
    """Workers that make their process group themselves (`join_group`).

    Ray's TorchTrainer has its controller load torch to do so, and takes a worker that was killed for its node's memory for a
    failure of the controller, which ends the run. It starts a process of Ray Data for each group of workers, but here they
    read their rows themselves; and one that removes placement groups of a dead controller, but Ray removes these with it.
    """

    def __init__(self, config: TrainingConfig, **options: Any) -> None:
        # As Ray's `train_loop_config`, its controller would load all that the config needs.
        super().__init__(partial(_work, config), backend_config=_Workers(), **options)

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


def _work(config: TrainingConfig) -> PowerhouseError | str | None:
    from powerhouse.training.work import work_or_tell  # here: the driver has no use for all that it loads, 1.3 s of a CPU

    return work_or_tell(config)


class _Backend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True
    """nccl goes straight from one GPU of a node to another where each worker sees all of them."""


class _Workers(BackendConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend
