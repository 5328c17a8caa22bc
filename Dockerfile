# tinysd-batch on one machine.
#
#   docker build -t tinysd-batch .                                                            # CPU
#   docker build -t tinysd-batch --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .   # CUDA
#   docker run --rm --gpus all --shm-size 1g -v "$PWD:/work" -v "$PWD/mine-2bit:/model:ro" tinysd-batch submit manifest.csv --model /model
#
# /work holds manifests and job folders. Leave --gpus out on a machine without GPUs. --user "$(id -u):$(id -g)" keeps files yours.

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml constraints.txt hatch_build.py README.md LICENSE NOTICE ./
COPY tinysd_batch tinysd_batch
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels

FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir -c /tmp/constraints.txt torch --index-url "$TORCH_INDEX"
COPY --from=build /wheels /tmp/wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt /tmp/wheels/*.whl && rm -rf /tmp/wheels /tmp/constraints.txt
# libgomp is torch's; fontconfig finds fonts for captions in other scripts.
RUN apt-get update && apt-get install -y --no-install-recommends fontconfig && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home user && mkdir /work && chown user /work
USER user
WORKDIR /work
VOLUME /work
ENTRYPOINT ["tinysd-batch"]
CMD ["--help"]
