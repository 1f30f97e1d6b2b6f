# An HTTP server of one model (`dyadlm serve`), on a CPU. This file was written without Docker at hand: it was not built.
#
#     docker build --tag dyadlm .
#     docker run --publish 8000:8000 --env DYADLM_API_KEY=SECRET --volume ./runs/first:/model:ro dyadlm
#
# Sessions are kept in the volume /sessions. To install the smaller CPU build of torch, name the index of PyTorch's CPU
# builds with --build-arg PIP_EXTRA_INDEX_URL=... and keep constraints.txt.
FROM python:3.11-slim
ARG PIP_EXTRA_INDEX_URL
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]"
RUN useradd --create-home dyadlm && install --directory --owner dyadlm /sessions
USER dyadlm
VOLUME /sessions
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dyadlm", "serve", "/model", "--host", "0.0.0.0", "--port", "8000", "--sessions", "/sessions"]
