# syntax=docker/dockerfile:1
# docker build -t chunkllama .                        a CPU server with the demo model inside
# docker build -t chunkllama:cuda --target cuda .     for NVIDIA GPUs
# docker run --rm -p 8000:8000 --read-only --tmpfs /tmp chunkllama
#
# BASE_IMAGE needs Python 3.11 or newer with venv, and apt. pip takes its index from its own
# configuration: mount one into the build, or bring a base image that has it.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS tools
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/chunkllama/venv
ENV PATH=/opt/chunkllama/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    CHUNKLLAMA_NATIVE_DIR=/opt/chunkllama/native
WORKDIR /src

FROM tools AS build-cpu
# Any pip requirement or options. Empty: torch's CPU build where pip finds one, else the default one.
ARG TORCH=""
RUN pip install ${TORCH:-"torch==2.13.0+cpu"} || { test -z "$TORCH" && pip install "torch>=2.11"; }
COPY pyproject.toml README.md LICENSE ./
COPY chunkllama chunkllama
COPY server server
COPY kernels kernels
COPY configs configs
RUN pip install .
# All levels, not this machine's alone: the image may run anywhere. It has no compiler.
RUN cd / && python -c "from chunkllama.backends.cpu.build import LEVELS, build; print(*map(build, LEVELS))"

FROM tools AS build-cuda
ARG TORCH=""
# cu12 or cu13: the CUDA version of torch's build.
ARG CUDA_EXTRA=cu12
RUN pip install ${TORCH:-"torch>=2.11"}
COPY pyproject.toml README.md LICENSE ./
COPY chunkllama chunkllama
COPY server server
COPY kernels kernels
COPY configs configs
RUN pip install ".[${CUDA_EXTRA}]"
RUN cd / && python -c "from chunkllama.backends.cpu.build import LEVELS, build; print(*map(build, LEVELS))"

FROM build-cpu AS model
ARG WITH_DEMO_MODEL=1
WORKDIR /opt/chunkllama/model
RUN touch server.yaml \
    && if [ "$WITH_DEMO_MODEL" = 1 ]; then \
        CHUNKLLAMA_CACHE=/tmp/cache chunkllama models fetch smollm2-135m-instruct > /tmp/path \
        && cp -r "$(cat /tmp/path)" smollm2-135m-instruct \
        && echo "model: /opt/chunkllama/model/smollm2-135m-instruct" > server.yaml \
        && rm -rf /tmp/cache /tmp/path; \
    fi

FROM ${BASE_IMAGE} AS runtime
LABEL org.opencontainers.image.title="ChunkLlama" \
      org.opencontainers.image.description="LLM serving for many tenants that share prompts" \
      org.opencontainers.image.licenses="Apache-2.0"
# Group 0, so that platforms that run it under a random uid (OpenShift) find the cache writable.
RUN mkdir -p /cache && chown 10001:0 /cache && chmod 2775 /cache
ENV PATH=/opt/chunkllama/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    CHUNKLLAMA_CACHE=/cache/chunkllama \
    CHUNKLLAMA_NATIVE_DIR=/opt/chunkllama/native \
    CHUNKLLAMA_CONFIG=/opt/chunkllama/model/server.yaml \
    CHUNKLLAMA_HOST=0.0.0.0
COPY --from=model /opt/chunkllama/model /opt/chunkllama/model
USER 10001:0
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["chunkllama", "health"]
ENTRYPOINT ["chunkllama"]
CMD ["serve"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/chunkllama/native /opt/chunkllama/native
COPY --from=build-cuda /opt/chunkllama/venv /opt/chunkllama/venv

# The last stage is what a plain build makes.
FROM runtime AS cpu
COPY --from=build-cpu /opt/chunkllama/native /opt/chunkllama/native
COPY --from=build-cpu /opt/chunkllama/venv /opt/chunkllama/venv
