"""Hold two evaluations of the same tasks against each other, item by item: differences, intervals, p-values.

python jobs/compare_models.py baseline=evaluations/one other=evaluations/two output=evaluations/two-against-one
"""

from powerhouse.evaluation.comparison import ComparisonConfig, compare_models
from powerhouse.job import run

if __name__ == "__main__":
    run(compare_models, ComparisonConfig, __doc__ or "")
