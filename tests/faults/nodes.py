"""Nodes of a Ray cluster on one machine, each with its own raylet, that are added, drained and killed."""

import subprocess
import sys

import psutil
from ray.cluster_utils import Cluster


def title(process):
    """Return what a process calls itself, or "" for one that has ended."""
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:  # a zombie is one too
        return ""


class Nodes:
    """A head that takes no tiles, and nodes of one CPU that come and go."""

    def __init__(self):
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.workers = []

    def at_least(self, count):
        """Have so many nodes, and no others."""
        while len(self.workers) > count:
            self.kill()
        while len(self.workers) < count:
            self.add()

    def add(self, cpus=1):
        self.workers.append(self.cluster.add_node(num_cpus=cpus))

    def kill(self, pid=None):
        """SIGKILL to a node's raylet, which its workers do not survive: a given one's, or any."""
        workers = [psutil.Process(pid)] if pid else []
        self.kill_raylet(workers[0].ppid() if workers else self.raylets()[0])
        psutil.wait_procs(workers, timeout=60)  # until then it may go on

    def kill_raylet(self, pid):
        """The same, by the pid of the raylet itself."""
        self.cluster.remove_node(self.workers.pop(self.raylets().index(pid)), allow_graceful=False)

    def raylets(self):
        """The process of each node, whose children its workers are."""
        return [node.all_processes["raylet"][0].process.pid for node in self.workers]

    def is_left(self):
        """Whether no worker of a run is on the node that `drain` and `kill` take."""
        titles = map(title, psutil.Process(self.raylets()[0]).children(recursive=True))
        return not any(words.startswith("ray::") and "IDLE" not in words for words in titles)

    def drain(self):
        """Announce that a node is going to be taken away."""
        node = self.workers[0].node_id
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.cluster.address]
        subprocess.run(
            [*command, "--node-id", node, *reason, "--deadline-remaining-seconds", "60"],
            check=True,
            capture_output=True,
        )
        return node
