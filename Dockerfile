# edgedistill with the onnx extra, run as a user without rights. As the one who runs it, files in the mounted folder are theirs:
#   docker build -t edgedistill .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -v edgedistill-store:/store edgedistill init quickstart
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -v edgedistill-store:/store edgedistill build quickstart

FROM debian:bookworm-slim AS builder
# llama.cpp is compiled here. For every x86-64 processor with AVX2 (2013 and later) instead of the one of this builder:
# the image may run elsewhere. For one kind of machine: --build-arg LLAMA_CMAKE_ARGS=-DGGML_NATIVE=ON
ARG LLAMA_CMAKE_ARGS=-DGGML_NATIVE=OFF
# PyPI serves torch with gigabytes of CUDA; with --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu its CPU
# build is taken. pip reads the variable by itself.
ARG PIP_EXTRA_INDEX_URL
# Versions of Debian packages are not pinned: old ones leave the mirrors when a security update comes.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/edgedistill
ENV PATH=/opt/edgedistill/bin:$PATH
WORKDIR /src
# What takes long comes first, so that a change of the source leaves these layers alone. torch before everything else: an
# index that has its CPU build serves that one.
COPY scripts/constraints.txt scripts/constraints.txt
RUN pip install --no-cache-dir -c scripts/constraints.txt torch==2.13.0 \
 && CMAKE_ARGS="$LLAMA_CMAKE_ARGS" pip install --no-cache-dir -c scripts/constraints.txt llama-cpp-python
COPY pyproject.toml README.md LICENSE ./
COPY targets targets
COPY edgedistill edgedistill
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
 && pip install --no-cache-dir -c scripts/constraints.txt "$(echo /wheels/edgedistill-*.whl)[onnx]"

FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends bubblewrap ca-certificates libgomp1 libstdc++6 python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home edgedistill \
 && install -d -m 1777 /store /work /home/edgedistill
COPY --from=builder /opt/edgedistill /opt/edgedistill
# Any user may run it, also one who has no name and no home here: then a library that asks for them gets these.
ENV PATH=/opt/edgedistill/bin:$PATH \
    EDGEDISTILL_STORE=/store \
    HOME=/home/edgedistill \
    USER=edgedistill
USER 10001
WORKDIR /work
ENTRYPOINT ["edgedistill"]
CMD ["--help"]
