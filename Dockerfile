# One run in a container. It reads and writes everything in /data:
#     docker build -t cal-ql .
#     mkdir -p data    # otherwise Docker makes it, owned by root
#     docker run --gpus all -v $PWD/data:/data cal-ql --config_path configs/antmaze.yaml --seed 1
# The container runs as user 1000; for another user, add --user $(id -u).
FROM python:3.11-slim-bookworm

# g++, which brings gcc, for torch.compile and Triton; OSMesa and EGL for evaluate.py --video; tini as
# PID 1. No versions are pinned, since Debian removes a package's old version from its servers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libegl1 libosmesa6 tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY --chmod=755 requirements*.txt ./
RUN pip install --no-cache-dir -r requirements-gymnasium.txt \
    && pip install --no-cache-dir --no-deps -r requirements-no-deps.txt
COPY --chmod=755 . .

# Caches and settings go to /tmp, since the user may have no home and no name. Everything else goes to
# /data. This includes compiled updates, which would take the next container a minute. Anybody may write
# in /data, so that a new named volume works for every user.
ENV HOME=/tmp \
    USER=calql \
    PYTHONUNBUFFERED=1 \
    WANDB_DIR=/data \
    D4RL_DATASET_DIR=/data/datasets \
    MINARI_DATASETS_PATH=/data/minari \
    OGBENCH_DATASET_DIR=/data/ogbench \
    TORCHINDUCTOR_CACHE_DIR=/data/compiled \
    MUJOCO_GL=osmesa \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
RUN useradd --uid 1000 --home-dir /tmp --no-create-home calql && install -d -m 1777 /data
USER 1000
# tini passes signals only to the run, which ends its own processes. As PID 1, Python would ignore a
# SIGTERM during its imports. -s: no warning if tini is not PID 1.
ENTRYPOINT ["tini", "-s", "--", "python", "cal_ql.py", "--checkpoints_path", "/data/runs"]
