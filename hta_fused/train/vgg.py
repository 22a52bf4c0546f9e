"""VGG for 32×32 images, as the CIFAR-10 recipe behind the paper's tables has it. Imports torch only."""

import torch
from torch import nn

CONFIGURATIONS: dict[str, tuple[int | str, ...]] = {
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "vgg19": (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
}


class Dropout(nn.Dropout):
    """nn.Dropout, that draws from a generator of its own where it has one: copies side by side would race for torch's."""

    generator: torch.Generator | None = None  # on the CPU

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.generator is None or not self.training or self.p in (0, 1):
            return super().forward(input)
        noise = torch.empty_like(input).bernoulli_(1 - self.p, generator=self.generator)
        return input * noise.div_(1 - self.p)  # as torch's does on the CPU, to the bit


class VGG(nn.Module):
    """Convolutions, then Dropout–Linear–ReLU twice, then Linear (chengyangfu/pytorch-vgg-cifar10's classifier).

    Args:
        name: "vgg11", "vgg13", "vgg16" or "vgg19".
        batch_norm: a batch norm after each convolution.
        width: factor on every number of channels, 512 in the classifier included.
        classes: outputs.
        dropout: the part of the classifier's inputs that training leaves out.

    Shapes: [batch, 3, 32, 32] to [batch, classes].
    """

    def __init__(self, name: str = "vgg11", batch_norm: bool = False, width: float = 1.0, classes: int = 10,
                 dropout: float = 0.5):  # fmt: skip
        super().__init__()
        if name not in CONFIGURATIONS:
            raise ValueError(f"name must be one of {', '.join(CONFIGURATIONS)}, got {name!r}")
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        layers: list[nn.Module] = []
        channels = 3
        for entry in CONFIGURATIONS[name]:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            out = max(1, round(entry * width))
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU(inplace=True))
            channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            Dropout(dropout),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions from N(0, 2/(k²·out)) with bias 0; every other layer as PyTorch draws it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, (2 / fan_out) ** 0.5)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()

    def seed(self, seed: int) -> None:
        """Makes dropout on the CPU draw from this seed on, whatever else draws."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = generator

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).flatten(1))


def parameter_count(name: str, batch_norm: bool, width: float, classes: int = 10) -> int:
    """The parameters of a VGG, without making it."""
    count, channels = 0, 3
    for entry in CONFIGURATIONS[name]:
        if not isinstance(entry, str):
            out = max(1, round(entry * width))
            count += out * (9 * channels + 1 + 2 * batch_norm)
            channels = out
    return count + 2 * channels * (channels + 1) + classes * (channels + 1)
