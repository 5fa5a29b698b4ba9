# ar-unified as an image, for a CPU, NVIDIA GPUs or TPUs:
#
#   docker build --build-arg BACKEND=tpu --tag ar-unified:tpu .        # cpu (default) | cuda | tpu
#   docker run --rm --volume "$PWD/workdirs:/job/workdirs" ar-unified:cpu run --config experiments/shapes.py --workdir workdirs/shapes
#
# The user of the image is not root (uid 1000): what it writes to must be writable for it. GPUs need the host's driver
# and NVIDIA's container runtime (`docker run --gpus all`); CUDA itself comes with the packages.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG BACKEND=cpu
ENV PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY ar_unified ar_unified
COPY tokenizers tokenizers
COPY experiments experiments
# The versions that the tests ran with, where there are some for this Python: constraints pin them.
# hadolint ignore=DL3013
RUN case "$BACKEND" in \
      cpu) package=. ;; \
      cuda | tpu) package=".[$BACKEND]" ;; \
      *) echo "BACKEND: expected cpu, cuda or tpu; found $BACKEND" >&2; exit 2 ;; \
    esac && \
    pins=requirements/py$(python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt && \
    if [ -f "$pins" ]; then set -- --constraint "$pins"; fi && \
    pip install --no-cache-dir "$@" "$package" && \
    useradd --create-home --uid 1000 user && \
    mkdir /job && chown user:user /job

WORKDIR /job
COPY --chown=user:user experiments experiments
USER 1000
ENTRYPOINT ["ar-unified"]
CMD ["--help"]
