"""A training loop in plain PyTorch. One line, and its import, let it be watched and steered while it runs.

    python examples/plain_loop/train.py

While it trains, from another terminal (`aetheria up` starts the hub, once):

    aetheria watch @last
    aetheria set @last learning_rate=0.001 --reason "try a smaller one"
    aetheria pause @last
"""

import math

import torch
from torch import nn

from aetheria import Weavelet

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Dropout(0.05), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9998)
weavelet = Weavelet(optimizer=optimizer, scheduler=scheduler).start()  # the one line

for step in range(1, 5001):
    x = torch.rand(256, 1) * 4 * math.pi
    loss = (model(x) - torch.sin(x)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 500 == 0:
        print(f"step {step}  loss {loss.item():.4f}  learning rate {optimizer.param_groups[0]['lr']:.5f}")
