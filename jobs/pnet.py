"""The first network of a pretrained face detector, on 200 real patches: 100 faces, 100 of what is beside them.

PNet of MTCNN (Zhang et al., IEEE Signal Processing Letters 2016), with the weights that facenet-pytorch ships.
"""

import torch
import torch.nn.functional as F
from packaged import folder_of
from torch import Tensor, nn

from pipeline import Problem

BOX_WEIGHT = 0.5  # of the box against the class, in MTCNN's own training of this network


class PNet(nn.Module):
    """Patches in; logits of (no face, face), and where the box is off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))  # shape: (N, 32, 1, 1)
        return self.conv4_1(x).flatten(1), self.conv4_2(x).flatten(1)


def detection_loss(output: tuple[Tensor, Tensor], face: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of all patches, and the box of the faces, which fills the patch: it is off by nothing."""
    logits, box = output
    off = (box.square().sum(1) * face).sum()
    return F.cross_entropy(logits, face, reduction="sum") + BOX_WEIGHT * off, len(face)


def pnet() -> Problem:
    """The whole network: 6,632 parameters."""
    model = PNet()
    weights = folder_of("facenet_pytorch", "--no-deps facenet-pytorch==2.6.0") / "data" / "pnet.pt"
    model.load_state_dict(torch.load(weights, weights_only=True))
    return Problem(model.eval(), detection_loss, patches())


def patches() -> tuple[Tensor, Tensor]:
    """The patches as the detector takes them, 12 x 12 and scaled to [-1, 1], and whether each is a face."""
    folder_of("skimage", "scikit-image")
    from skimage.data import lfw_subset

    grey = torch.from_numpy(lfw_subset()).float()[:, None]  # shape: (200, 1, 25, 25)
    small = F.interpolate(grey, (12, 12), mode="area")
    face = (torch.arange(len(grey)) < len(grey) // 2).long()  # they come first
    return ((small * 255 - 127.5) / 128).expand(-1, 3, -1, -1).contiguous(), face
