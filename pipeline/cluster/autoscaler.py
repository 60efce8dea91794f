"""Which machine Ray's autoscaler asks for: on-demand ones where there are no spot machines to be had.

Named on the head by `RAY_AUTOSCALER_UTILIZATION_SCORER=pipeline.cluster.autoscaler.score`.
"""

from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer


def score(
    node_resources: dict[str, Any],
    demands: list[dict[str, Any]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Rate a type of machine for what waits to be placed.

    Ray's own rating knows how well a type fits, and not whether the cloud has any. Of two types that differ in price
    alone it would take the same one each time, however often that is refused.

    Args:
        node_resources: of one machine.
        demands: resources of each actor that waits.
        node_type: its name in the cluster's file. Of equally rated types Ray takes the last by name.
        node_availability_summary: what became of the last launch of each type, for half an hour.

    Returns:
        A tuple, larger is better; None where the machine fits no demand.
    """
    rating = _default_utilization_scorer(
        node_resources, demands, node_type, node_availability_summary=node_availability_summary
    )
    if rating is None:
        return None
    spares_gpus, *fit = rating
    last = node_availability_summary.node_availabilities.get(node_type)
    return spares_gpus, last is None or last.is_available, *fit
