# The service in a container: CPU, no torch, not as root. The model is not in the image: it is mounted, or fetched by SageMaker.
#
#   docker build -t binvision .
#   docker run --rm -p 8080:8080 -v "$PWD/runs/first/model:/opt/ml/model:ro" binvision
#
# tests/test_container.py runs the steps below (RUN, ENV, ENTRYPOINT, CMD, HEALTHCHECK) in a clean environment.

FROM python:3.12-slim AS build
COPY . /src
RUN python -m venv /venv
RUN python /src/tools/serve_requirements.py > /requirements.txt
RUN /venv/bin/pip install --no-cache-dir --requirement /requirements.txt
RUN /venv/bin/pip install --no-cache-dir --no-deps /src

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home binvision
COPY --from=build /venv /venv
ENV BINVISION_HOST=0.0.0.0 BINVISION_PORT=8080 PYTHONUNBUFFERED=1
EXPOSE 8080
USER 10001
WORKDIR /home/binvision
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["/venv/bin/python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"BINVISION_PORT\"]}/healthz', timeout=4)"]
ENTRYPOINT ["/venv/bin/binvision"]
CMD ["serve"]
