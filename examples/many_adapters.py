"""One model, many adapters, and a batch in which every row has its own: python examples/many_adapters.py"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import vblora


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    with tempfile.TemporaryDirectory() as folder:
        x, expected = torch.randn(4, 64), []
        for row, name in enumerate(["alice", "bob", "carol"]):
            config = vblora.VBLoRAConfig(
                r=4, num_vectors=32, vector_length=32, target_modules=["0", "2"], init_vector_bank_bound=0.5
            )
            adapter = vblora.attach(model, config, seed=row)  # here training would follow
            expected.append(model(x[row]).detach())
            size = adapter.pack(Path(folder) / f"{name}.safetensors", bank="lossless", weights="lossless")
            adapter.detach()
            print(f"{name}: {size:,} bytes")
        expected.append(model(x[3]).detach())  # the base model
        store = vblora.AdapterStore(model, folder)
        with store.rows(["alice", "bob", "carol", None]), torch.no_grad():
            together = model(x)
        print(f"largest difference from one at a time: {(together - torch.stack(expected)).abs().max():.1e}")


if __name__ == "__main__":
    main()
