"""A cloud whose spot machines can run out: Ray nodes on this machine, started and ended by Ray's autoscaler."""

import json
from pathlib import Path

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE


class Machines(FakeMultiNodeProvider):
    """Notes what becomes of each; what is named in `sold_out` is refused as AWS refuses it."""

    def __init__(self, provider_config, cluster_name):
        super().__init__(provider_config, cluster_name)
        self._nodes[self._head_node_id]["tags"][TAG_RAY_USER_NODE_TYPE] = "head"

    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        if kind in self.provider_config["sold_out"]:
            self._note("refused", kind)
            raise NodeLaunchException("InsufficientInstanceCapacity", "no capacity in any zone", None)
        for _ in range(count):
            super().create_node_with_resources_and_labels(node_config, tags, 1, resources, labels)
            self._note("started", kind)

    def terminate_node(self, node_id):
        self._note("ended", self.node_tags(node_id)[TAG_RAY_USER_NODE_TYPE])
        super().terminate_node(node_id)

    def _note(self, event, kind):
        with Path(self.provider_config["events"]).open("a") as events:
            events.write(json.dumps([event, kind]) + "\n")
