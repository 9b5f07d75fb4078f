"""The networks: FCN, U-Net, SegNet, and a few convolutions; each gives logits of the images' size."""

from __future__ import annotations

from collections.abc import Callable

import segmentation_models_pytorch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCNHead


class FCN(nn.Module):
    """torchvision's FCN on the first stages of a ResNet-18, to a stride of 8; a ResNet-50 would take hours here."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        backbone = IntermediateLayerGetter(torchvision.models.resnet18(weights=None), {"layer2": "out"})
        self.model = torchvision.models.segmentation.FCN(backbone, FCNHead(128, channels))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, channels, S, S)."""
        logits: Tensor = self.model(images)["out"]
        return logits


def unet(channels: int) -> nn.Module:
    """segmentation-models-pytorch's U-Net on a ResNet-18, of three stages for small pictures."""
    network: nn.Module = segmentation_models_pytorch.Unet(
        "resnet18", encoder_depth=3, decoder_channels=(64, 32, 16), encoder_weights=None, classes=channels
    )
    return network


class SegNet(nn.Module):
    """An encoder whose pooling places are where the decoder puts its values back.

    Source: Badrinarayanan et al., SegNet, 2015, arXiv:1511.00561, with three of its five stages, of 16, 32 and
    64 channels, for small pictures.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        inputs = (3, *widths[:-1])
        self.encoders = nn.ModuleList(
            nn.Sequential(_block(i, o), _block(o, o)) for i, o in zip(inputs, widths, strict=True)
        )
        outputs = (widths[0], *widths[:-1])
        self.decoders = nn.ModuleList(
            nn.Sequential(_block(i, i), _block(i, o)) for i, o in zip(widths, outputs, strict=True)
        )
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, channels, S, S), S a multiple of 8."""
        values, places = images, []
        for encoder in self.encoders:
            values, indices = self.pool(encoder(values))
            places.append(indices)
        for decoder, indices in zip(reversed(self.decoders), reversed(places), strict=True):
            values = decoder(self.unpool(values, indices))
        logits: Tensor = self.last(values)
        return logits


def small(channels: int) -> nn.Module:
    """Three hidden layers of 32 channels, 3 x 3, stride 1: it sees 9 x 9 px."""
    return nn.Sequential(_block(3, 32), _block(32, 32), _block(32, 32), nn.Conv2d(32, channels, 3, padding=1))


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


#: Networks by name, given the channels of their logits.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "FCN": FCN,
    "U-Net": unet,
    "SegNet": SegNet,
    "small": small,
}
