"""Every metric that a table may hold, declared once.

``from workbench import metrics``; then ``metrics.RECALL.rows(results, split="forget-heldout")``.
"""

from workbench.metrics import inside, landscape, models, triggers
from workbench.metrics.declare import (
    ALONE as ALONE,
)
from workbench.metrics.declare import (
    AXES as AXES,
)
from workbench.metrics.declare import (
    METRICS as METRICS,
)
from workbench.metrics.declare import (
    TOKEN as TOKEN,
)
from workbench.metrics.declare import (
    Metric as Metric,
)
from workbench.metrics.declare import (
    matching as matching,
)
from workbench.metrics.declare import (
    metric as metric,
)
from workbench.metrics.declare import (
    metric_of as metric_of,
)
from workbench.metrics.inside import *
from workbench.metrics.landscape import *
from workbench.metrics.models import *
from workbench.metrics.triggers import *

GROUPS = {
    "Models and attacks": models,
    "Inside the model": inside,
    "Triggers": triggers,
    "Loss landscape": landscape,
}

METRICS.own([entry for group in GROUPS.values() for entry in group.DECLARED])
