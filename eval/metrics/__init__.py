"""GLUE's metrics and those of each class.

`scores.py` defines them by scikit-learn and scipy, `glue.py` and `per_class.py` are the same as `evaluate` modules,
`bootstrap.py` gives their intervals.
"""

from eval.metrics.bootstrap import intervals
from eval.metrics.scores import Scores, class_scores, glue_scores

__all__ = ["Scores", "class_scores", "glue_scores", "intervals"]
