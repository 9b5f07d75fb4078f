"""How often each anchor is sampled: torchvision's sampler beside the one that does not synchronize."""

import torch
from matplotlib import pyplot as plt
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from maskloss.detection.sampling import sample_padded

torch.manual_seed(0)
labels = torch.tensor([1.0] * 12 + [0.0] * 36 + [-1.0] * 4)
sampler = BalancedPositiveNegativeSampler(batch_size_per_image=16, positive_fraction=0.5)
draws = 4000
stock, ours = torch.zeros(len(labels)), torch.zeros(len(labels))
for _ in range(draws):
    positive, negative = sampler([labels])
    stock += positive[0] + negative[0]
    padded = sample_padded([labels], sampler)
    ours[padded.indices[0, : int(padded.num_sampled[0])]] += 1

figure, axis = plt.subplots(figsize=(8.4, 2.4), layout="constrained")
axis.stairs(stock / draws, label="torchvision's sampler")
axis.stairs(ours / draws, label="sync-free", linestyle="--")
axis.set(
    xlabel="anchor: 12 positives, 36 negatives, 4 that are neither", ylabel="share of draws", ylim=(0, 0.8)
)
axis.legend(frameon=False)
