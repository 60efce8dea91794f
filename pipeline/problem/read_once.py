"""Numbers of a device that decide how a computation goes on: read once, and from then on checked where they are."""

from collections.abc import Hashable

import torch
from torch import Tensor


class ReadOnce:
    """Upper bounds of counts that are the same in each micro-batch as a rule.

    Reading a number makes the host wait until the device has computed it, and the device wait for the host then. What
    is computed within a bound that was exceeded is wrong: who reads it has to look at `exceeded`, and compute it anew
    after `give_up`.
    """

    def __init__(self) -> None:
        self._bounds: dict[Hashable, int] = {}
        self._exceeded: Tensor | None = None
        self._is_given_up = False

    def bound(self, key: Hashable, count: Tensor, most: int) -> int:
        """Return a bound of a count.

        Args:
            key: of what is counted.
            count: on the device.  # shape: ()
            most: that it can be.

        Returns:
            What was seen first, at least 1; `most` once bounds are given up.
        """
        if self._is_given_up:
            return most
        if key not in self._bounds:
            self._bounds[key] = max(int(count), 1)
            return self._bounds[key]
        over = count > self._bounds[key]
        self._exceeded = over if self._exceeded is None else self._exceeded | over
        return self._bounds[key]

    def exceeded(self, like: Tensor) -> Tensor:
        """Return on the device whether a bound was exceeded since the last call, and begin anew.

        Args:
            like: a tensor of that device.

        Returns:
            A boolean.  # shape: ()
        """
        found, self._exceeded = self._exceeded, None
        return like.new_zeros((), dtype=torch.bool) if found is None else found

    def give_up(self) -> None:
        """Take the largest that each count can be from now on."""
        self._is_given_up = True
