# One run in a container, with the folder /data for everything that it reads and writes:
#     docker build -t cal-ql .
#     mkdir -p data    # else Docker makes it, as root's
#     docker run --gpus all -v $PWD/data:/data cal-ql --config_path configs/antmaze.yaml --seed 1
# The run is user 1000's; who is another adds --user $(id -u).
FROM python:3.11-slim-bookworm

# g++, which brings gcc: torch.compile and Triton compile on first use, against this image's Python.h;
# OSMesa and EGL: evaluate.py --video; tini: PID 1.
# Debian removes a package's old version from its servers, so that a pinned one would not build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libegl1 libosmesa6 tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY --chmod=755 requirements*.txt ./
RUN pip install --no-cache-dir -r requirements-gymnasium.txt \
    && pip install --no-cache-dir --no-deps -r requirements-no-deps.txt
COPY --chmod=755 . .

# Caches and settings go to /tmp, for the user may have no home and no name; all else to /data, also
# what torch.compile and Triton have compiled, since the next container would need a minute for it.
# Anybody may write in /data, so that a new named volume belongs to whoever comes.
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
# tini passes signals to the run alone, which ends its own processes, and Python's default action for
# SIGTERM, which PID 1 has not, ends the imports at once. -s: no warning where tini is not PID 1.
ENTRYPOINT ["tini", "-s", "--", "python", "cal_ql.py", "--checkpoints_path", "/data/runs"]
