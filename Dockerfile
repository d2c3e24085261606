# Image for GPU nodes, also as nodes of a Ray cluster (install the cluster's own Ray version with RAY=ray[default]==...).
# Build: docker build -t physio-dist .
FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1
# A compiler and Python's headers are for what torch and DeepSpeed compile at run time; ssh is for DeepSpeed's own
# multi-node launcher; the rest is what Ray's cluster launcher expects of an image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential ca-certificates git openssh-client numactl procps python3 python3-dev python3-venv rsync tini wget \
    && rm -rf /var/lib/apt/lists/*

# A volume that is mounted over the cache takes its owner from here.
RUN useradd --create-home --shell /bin/bash --uid 10001 physio \
    && install -d -o physio -g physio /home/physio/.cache /home/physio/.cache/physio-dist
# By number, so that a cluster can see that it is not root.
USER 10001
WORKDIR /home/physio/physio-dist

ENV PHYSIO_DIST_VENV=/home/physio/venv PATH=/home/physio/venv/bin:$PATH
ARG TORCH="torch>=2.6"
ARG RAY="ray[default,train,tune]"
COPY --chown=physio:physio pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=physio:physio physio_dist physio_dist
COPY --chown=physio:physio tools tools
COPY --chown=physio:physio configs configs
# Ray's version is the cluster's, given by the argument RAY.
# hadolint ignore=DL3013
RUN PHYSIO_DIST_TORCH="$TORCH" bash tools/setup.sh && pip install --no-cache-dir "$RAY"

ENTRYPOINT ["tini", "--"]
CMD ["bash"]
