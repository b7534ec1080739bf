# syntax=docker/dockerfile:1
# docker build -t chunkllama .                        a CPU server with the demo model inside
# docker build -t chunkllama:cuda --target cuda .     for NVIDIA GPUs
# docker run --rm -p 8000:8000 --read-only --tmpfs /tmp chunkllama
# docker run --rm -p 8000:8000 --gpus all chunkllama:cuda
#
# BASE_IMAGE needs Python 3.11 or newer with venv, and apt; python3-venv on Debian or Ubuntu will do.
# pip takes its index from its own configuration: mount one into the build, or bring a base image
# that has it.
#
# The layers of an image, in this order: base, dependencies, demo model, this project. A changed
# source changes the last one only, a few megabytes.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS tools
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/chunkllama/venv
ENV PATH=/opt/chunkllama/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements requirements
COPY deploy/drop-unused.sh /usr/local/bin/drop-unused

# The project without its dependencies, its kernels compiled for every x86-64 level: the image may
# run anywhere and has no compiler.
FROM tools AS project
COPY pyproject.toml setup.py README.md LICENSE ./
COPY chunkllama chunkllama
COPY server server
COPY kernels kernels
COPY configs configs
RUN pip install --no-deps --target /opt/chunkllama/app . \
    && ls /opt/chunkllama/app/chunkllama/_native/*.so \
    && find /opt/chunkllama/app -name __pycache__ -prune -exec rm -rf {} + \
    && find /opt/chunkllama/app -exec touch -h -d @0 {} +

FROM tools AS dependencies-cpu
# Any pip requirement or options. Empty: torch's CPU build where pip finds one, else the default one.
ARG TORCH=""
RUN { pip install ${TORCH:-"torch==2.13.0+cpu"} || { test -z "$TORCH" && pip install "torch==2.13.0"; }; } \
    && drop-unused
RUN pip install --no-deps --require-hashes -r requirements/serving.txt \
    && drop-unused \
    && echo /opt/chunkllama/app > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/chunkllama.pth"

FROM tools AS dependencies-cuda
# Empty: torch's default build, for CUDA 13, with CuPy and the compiler of that major.
ARG TORCH=""
COPY pyproject.toml ./
RUN if [ -z "$TORCH" ]; then \
        pip install --no-deps --require-hashes -r requirements/cu13.txt; \
    else \
        pip install $TORCH \
        && python -c "import tomllib, torch; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*extras['cu' + torch.version.cuda.split('.')[0]], sep='\n')" \
            > /cuda.txt \
        && pip install -r /cuda.txt; \
    fi \
    && drop-unused
RUN pip install --no-deps --require-hashes -r requirements/serving.txt \
    && drop-unused \
    && echo /opt/chunkllama/app > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/chunkllama.pth"

FROM dependencies-cpu AS model
ARG WITH_DEMO_MODEL=1
COPY --from=project /opt/chunkllama/app /opt/chunkllama/app
WORKDIR /opt/chunkllama/model
# The weights in the type that the model is computed in, which halves the layer. One time stamp for all
# files: the layer stays the same when the sources change.
RUN touch server.yaml \
    && if [ "$WITH_DEMO_MODEL" = 1 ]; then \
        CHUNKLLAMA_CACHE=/tmp/cache python -m chunkllama_server.cli models fetch smollm2-135m-instruct > /tmp/path \
        && cp -r "$(cat /tmp/path)" smollm2-135m-instruct \
        && python -c "import torch; from safetensors.torch import load_file, save_file; path = 'smollm2-135m-instruct/model.safetensors'; save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path, {'format': 'pt'})" \
        && chmod -R a+rX smollm2-135m-instruct \
        && echo "model: /opt/chunkllama/model/smollm2-135m-instruct" > server.yaml \
        && rm -rf /tmp/cache /tmp/path; \
    fi \
    && find . -exec touch -d @0 {} +

FROM ${BASE_IMAGE} AS runtime
LABEL org.opencontainers.image.title="ChunkLlama" \
      org.opencontainers.image.description="LLM serving for many tenants that share prompts" \
      org.opencontainers.image.licenses="Apache-2.0"
# Group 0, so that platforms that run it under a random uid (OpenShift) find the cache writable.
RUN mkdir -p /cache && chown 10001:0 /cache && chmod 2775 /cache
ENV PATH=/opt/chunkllama/app/bin:/opt/chunkllama/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    CHUNKLLAMA_CACHE=/cache/chunkllama \
    CHUNKLLAMA_CONFIG=/opt/chunkllama/model/server.yaml \
    CHUNKLLAMA_HOST=0.0.0.0
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# Follows the flags of `docker run`, the environment and the YAML file: port, address and TLS.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["chunkllama", "health"]
ENTRYPOINT ["chunkllama"]
CMD ["serve"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=dependencies-cuda /opt/chunkllama/venv /opt/chunkllama/venv
COPY --from=model /opt/chunkllama/model /opt/chunkllama/model
COPY --from=project /opt/chunkllama/app /opt/chunkllama/app
USER 10001:0

# The last stage is what a plain build makes.
FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/chunkllama/venv /opt/chunkllama/venv
COPY --from=model /opt/chunkllama/model /opt/chunkllama/model
COPY --from=project /opt/chunkllama/app /opt/chunkllama/app
USER 10001:0
