# The page of EVACap and its command line.
#   docker build -t evacap .
#   docker build -t evacap --build-arg BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04 .
ARG BASE=python:3.11-slim
FROM ${BASE}

# Options of pip, such as the index of PyTorch's wheels for CPUs, which are smaller.
ARG PIP_OPTIONS=

# The images of CUDA have no Python.
RUN python3 -m ensurepip --version > /dev/null 2>&1 || \
    (apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/evacap
ENV PATH=/opt/evacap/bin:$PATH

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ${PIP_OPTIONS} ".[app]"
RUN evacap check-install

RUN useradd --create-home evacap
USER evacap
WORKDIR /home/evacap
# Files of a volume are named from here: docker run -v "$PWD:/home/evacap" evacap caption clip.mp4
EXPOSE 7860
ENTRYPOINT ["evacap"]
CMD ["demo", "--host", "0.0.0.0", "--port", "7860"]
