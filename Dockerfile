# An image with the package and what it uses on a GPU. It has never been built: docs/install.md says what was tried. For
# apptainer: docker/jetmoe.def.
#
#   docker build --build-arg BASE=IMAGE -t jetmoe-megatron .
#   docker build --build-arg BASE=IMAGE --build-arg OPTIONS=--all -t jetmoe-megatron .
#
# IMAGE is NVIDIA's PyTorch container, or, with OPTIONS=--all, one with Python 3.10 to 3.13 and the CUDA toolkit. Name it
# by an exact tag or digest: its packages stay, and the others come in the versions of constraints.txt.
ARG BASE
FROM ${BASE}
ARG OPTIONS=--megablocks
# There is no GPU to ask while an image is built. 9.0 is Hopper.
ENV TORCH_CUDA_ARCH_LIST=9.0
WORKDIR /opt/jetmoe-megatron
COPY . .
RUN bash scripts/install_gpu.sh --pinned ${OPTIONS}
