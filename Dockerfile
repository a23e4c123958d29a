# For a machine with an NVIDIA GPU: PyTorch's wheels bring CUDA along, and the host its driver.
#   docker build -t vblora . && docker run --gpus all -it vblora
FROM python:3.11-slim
WORKDIR /vblora
COPY . .
# A compiler is what Triton and torch.compile need when they run.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN PIP_NO_CACHE_DIR=1 ./scripts/setup.sh
ENV PATH=/vblora/.venv/bin:$PATH
CMD ["bash"]
