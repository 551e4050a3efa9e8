"""What the server that ranks are forked from has imported before."""

import torch.distributed.fsdp
import torch.distributed.tensor
import torch.distributed.tensor.parallel
import torch.optim

import aetheria.accelerator
import aetheria.control.agreement
import aetheria.orchestrator
import aetheria.plugins
import aetheria.snapshot.sharded  # noqa: F401

torch.optim.SGD([torch.zeros(1)])  # torch imports its compiler when the first optimiser is made
