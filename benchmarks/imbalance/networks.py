"""Networks for the comparison: FCN, U-Net, SegNet and a small one; each returns logits of the images' size."""

from __future__ import annotations

from collections.abc import Callable

import segmentation_models_pytorch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCNHead


class FCN(nn.Module):
    """FCN of torchvision on the first stages of a ResNet-18, up to stride 8; a ResNet-50 would take hours here."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        backbone = IntermediateLayerGetter(torchvision.models.resnet18(weights=None), {"layer2": "out"})
        self.model = torchvision.models.segmentation.FCN(backbone, FCNHead(128, channels))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, S, S) to logits (N, channels, S, S)."""
        logits: Tensor = self.model(images)["out"]
        return logits


def unet(channels: int) -> nn.Module:
    """Build the U-Net of segmentation-models-pytorch on a ResNet-18, with three stages for small images."""
    network: nn.Module = segmentation_models_pytorch.Unet(
        "resnet18", encoder_depth=3, decoder_channels=(64, 32, 16), encoder_weights=None, classes=channels
    )
    return network


class SegNet(nn.Module):
    """SegNet, whose decoder unpools values to the positions that the encoder pooled them from.

    Source: Badrinarayanan et al., SegNet, 2015, arXiv:1511.00561, but with three stages of 16, 32 and 64 channels
    instead of five, for small images.
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
        """Map images (N, 3, S, S) to logits (N, channels, S, S), for S a multiple of 8."""
        values, places = images, []
        for encoder in self.encoders:
            values, indices = self.pool(encoder(values))
            places.append(indices)
        for decoder, indices in zip(reversed(self.decoders), reversed(places), strict=True):
            values = decoder(self.unpool(values, indices))
        logits: Tensor = self.last(values)
        return logits


def small(channels: int) -> nn.Module:
    """Build three hidden 3 x 3 layers of 32 channels and stride 1, with a receptive field of 9 x 9 px."""
    return nn.Sequential(_block(3, 32), _block(32, 32), _block(32, 32), nn.Conv2d(32, channels, 3, padding=1))


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


#: Builders of networks by name; each takes the number of channels of the logits.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "FCN": FCN,
    "U-Net": unet,
    "SegNet": SegNet,
    "small": small,
}
