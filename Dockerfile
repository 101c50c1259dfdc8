# One image for every role; the command decides which:
#   python orderproc.py                                  the API (the default)
#   python consumer.py                                   the worker
#   python -m lambdas.local --host 0.0.0.0 --port 9001   the Lambda functions, where there is no AWS

FROM python:3.13-slim AS build
WORKDIR /build
RUN python -m venv /opt/venv
COPY requirements.txt .
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check -r requirements.txt \
 && /opt/venv/bin/pip uninstall --quiet --yes pip

FROM python:3.13-slim
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY . .
# Beside /tmp only /data is ever written; a new volume mounted there gets its owner from here.
RUN python -m compileall -q . && install -d -o 10001 -g 10001 /data
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 DATA_DIR=/data HEALTH_URL=http://127.0.0.1:8080/healthz
USER 10001:10001
EXPOSE 8080 9090 9001
# Says that the process lives, not that its servers do. Other roles set HEALTH_URL.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
CMD ["python", "orderproc.py"]

ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="orderproc" \
      org.opencontainers.image.description="An event-driven order processor: REST API, consumer, Lambda functions" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
