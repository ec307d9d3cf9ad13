# The same model repository, served by NVIDIA's Triton container.
#
#   docker build -t fi-runtime .
#   docker run --init --gpus all --shm-size=1g -p 8000-8002:8000-8002 \
#       --read-only --tmpfs /tmp --cap-drop=ALL --security-opt=no-new-privileges fi-runtime
#
# Without --gpus the engine runs on the CPU. ARCH: compute capabilities of the GPUs to serve on.
# The server runs as an unprivileged user who owns none of its files, and writes to /tmp and /dev/shm
# alone (docs/SECURITY.md).
ARG TRITON=25.08
ARG CUDA=13.0.1
ARG ARCH=9.0a

# The GPU kernels, compiled here so that no container ever compiles one. Needs no GPU.
FROM nvcr.io/nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS kernels
ARG ARCH
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY . .
RUN PIP_NO_CACHE_DIR=1 python3 tools/setup.py --packages --extras gpu \
    && PATH="/build/.venv/bin:$PATH" .venv/bin/python -m fi_runtime prebuild --arch "${ARCH}"

# Any release from 24.11 on: their Python is 3.12, one of the two that the project supports.
FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3

# Ubuntu keeps venv's pip apart.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The image comes with an unprivileged user of this name for the server.
RUN id triton-server >/dev/null 2>&1 || useradd --create-home triton-server
WORKDIR /opt/fi_runtime

# The packages first: they change less often than the code.
COPY pyproject.toml requirements.lock ./
COPY tools/setup.py tools/
RUN mkdir fi_runtime client && PIP_NO_CACHE_DIR=1 python3 tools/setup.py --extras gpu
COPY . .
COPY --from=kernels /build/model_repository/llm/kernels model_repository/llm/kernels
RUN python3 -m compileall -q fi_runtime client tools model_repository

USER triton-server
# Caches of libraries, which else go to the home folder.
ENV HOME=/tmp TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
EXPOSE 8000 8001 8002
# Starts the container's own tritonserver with the packages above, closes the APIs with which clients
# name memory and files of the machine, and ends everything on SIGTERM: at once on a second one.
ENTRYPOINT ["/opt/fi_runtime/.venv/bin/python", "-m", "tools.serve", "--http-address=0.0.0.0", "--grpc-address=0.0.0.0", "--metrics-address=0.0.0.0", "--exit-timeout-secs=30"]
