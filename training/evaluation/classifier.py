"""
A classifier of point clouds, trained on real meshes, which says whether samples are what they were asked to
be: a small PointNet (Qi et al., arXiv 1612.00593) without its alignment networks. N clouds, P points, C categories.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.evaluation.meshes import GridMesh, clouds
from training.evaluation.novelty import symmetries

# Of training meshes twice as many points are kept, and other ones drawn from them each time.
POINTS = {"cuda": 1024}
POINTS_ELSEWHERE = 128
EPOCHS = {"cuda": 60}
EPOCHS_ELSEWHERE = 10
BATCH = 64
LEARNING_RATE = 4e-3
NOISE = 0.01  # deviation of what is added to a coordinate, in longest sides


class PointNet(nn.Module):
    """Clouds (N, P, 3) -> scores (N, C): each point by itself, then the largest and the mean of all points."""

    def __init__(self, categories: int):
        super().__init__()
        self.of_points = nn.ModuleList([nn.Linear(3, 64), nn.Linear(64, 128), nn.Linear(128, 256)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(each.out_features) for each in self.of_points])
        self.of_cloud = nn.Sequential(
            nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, categories)
        )

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        rows = points.flatten(0, 1)
        for layer, norm in zip(self.of_points, self.norms, strict=True):
            rows = norm(layer(rows)).relu()
        rows = rows.unflatten(0, points.shape[:2])
        return self.of_cloud(torch.cat([rows.amax(dim=1), rows.mean(dim=1)], dim=1))


class Classifier(NamedTuple):
    """A trained network, and what it was trained for."""

    network: PointNet
    categories: list[str]
    points: int
    device: Any

    @torch.no_grad()
    def ranks(self, meshes: Sequence[GridMesh], labels: np.ndarray, seed: int = 0) -> np.ndarray:
        """For each mesh how many categories are likelier than its own in `labels` (N,): 0 where the classifier
        agrees. Scores are means over the eight `symmetries`."""
        if not meshes:
            return np.zeros(0, dtype=np.int64)
        self.network.eval()
        turns = torch.from_numpy(symmetries()).to(self.device)
        points = torch.from_numpy(clouds(meshes, self.points, seed, 3)).to(self.device)
        scores = torch.cat(
            [sum(self.network(part @ turn).softmax(dim=1) for turn in turns) for part in points.split(BATCH)]
        )
        own = scores.gather(1, torch.from_numpy(labels)[:, None].to(self.device))
        return (scores > own).sum(dim=1).cpu().numpy()


def train_classifier(
    meshes: Sequence[GridMesh],
    categories: Sequence[str],
    device: Any = "cpu",
    points: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
) -> Classifier:
    """
    A classifier of those of the meshes whose category is one of `categories`. Each is turned by quarters about the
    vertical axis and mirrored at random; of rare categories each mesh weighs more, by the root of how rare they are.

    Args:
        points: of each cloud; None: POINTS of the kind of device.
        epochs: passes over the meshes; None: EPOCHS of the kind of device.

    Raises ValueError where fewer than two of the categories have meshes.
    """
    kind, names = torch.device(device).type, list(categories)
    points = points or POINTS.get(kind, POINTS_ELSEWHERE)
    epochs = epochs or EPOCHS.get(kind, EPOCHS_ELSEWHERE)
    known = [mesh for mesh in meshes if mesh.category in names]
    labels = torch.tensor([names.index(mesh.category) for mesh in known], dtype=torch.long)
    counts = torch.bincount(labels, minlength=len(names))
    if (counts > 0).sum() < 2:
        raise ValueError(
            "a classifier tells at least two categories apart: training meshes of the model's are missing"
        )
    everything = torch.from_numpy(clouds(known, 2 * points, seed, 4)).to(device)
    labels, turns = labels.to(device), torch.from_numpy(symmetries()).to(device)
    weights = counts.clamp(min=1).double().rsqrt().float().to(device)
    steps = -(-len(known) // BATCH)
    own_random = torch.random.fork_rng(devices=[torch.device(device)] if kind == "cuda" else [])
    with own_random, torch.enable_grad():
        torch.manual_seed(seed)
        network = PointNet(len(names)).to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
        for _ in range(epochs):
            for places in torch.randperm(len(known), device=device).chunk(steps):
                chosen = torch.randperm(2 * points, device=device)[:points]
                turned = everything[places][:, chosen] @ turns[torch.randint(8, (len(places),), device=device)]
                scores = network(turned + NOISE * torch.randn_like(turned))
                loss = F.cross_entropy(scores, labels[places], weights, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return Classifier(network.eval(), names, points, device)


def agreement(ranks: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """
    How often the classifier agrees: `top_1`, `top_3`, `macro` (top-1 of each category that there is, averaged) and
    `by_category`, its meshes and top-1.

    Args:
        ranks: (N,) as of `Classifier.ranks`; of what is no mesh anything above 2.
        labels: (N,) numbers of the categories.
    """
    by_category = {
        names[label]: {"meshes": int((labels == label).sum()), "top_1": float((ranks[labels == label] == 0).mean())}
        for label in np.unique(labels).tolist()
    }
    return {
        "meshes": len(ranks),
        "top_1": float((ranks == 0).mean()),
        "top_3": float((ranks < 3).mean()),
        "macro": float(np.mean([each["top_1"] for each in by_category.values()])),
        "by_category": by_category,
    }
