# The program on a CUDA device. CUDA's runtime is the image's; cuBLAS, cuDNN and the rest come with torch, built for the same version.
#   docker build -t sd-dadapt .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD/input:/app/input" -v "$PWD/logs:/app/logs" -v "$PWD/cache:/cache" \
#     sd-dadapt --config configs/sd15.json
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# A compiler and Python's headers are for torch.compile, which the optimizer's step runs through.
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc g++ \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor

WORKDIR /app
COPY requirements.txt requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock

COPY LICENSE README.md train.py train.json optimizer.json optimizer_dadapt.json ./
COPY configs configs
COPY examples examples
COPY models models
COPY scripts scripts
COPY data data
COPY trainer trainer

ENTRYPOINT ["python", "train.py"]
CMD ["--config", "train.json"]
