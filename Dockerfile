# clevrd in a container: docker build -t clevrd . && docker run -p 127.0.0.1:8080:8080 clevrd
# The daemon keeps no files, so --read-only --cap-drop=ALL is right for it. To carry topics over a
# planned restart: -e CLEVRD_STATE_DIR=/var/lib/clevrd -v clevrd-state:/var/lib/clevrd
# The configuration and what it names (certificates, keys, key sets) come from a folder that user 10001
# can read, mounted as a whole so that renewed files are seen; `docker kill -s HUP` reads them again:
#   -e CLEVRD_CONFIG=/etc/clevrd/clevrd.toml -v ./clevrd:/etc/clevrd:ro
# `make image-test` builds it and tries it out.

# One version, raised on purpose. A tag can still be given to another image; a digest can't:
#   docker buildx imagetools inspect python:3.12.12-slim-bookworm    shows it, then
#   --build-arg BASE=docker.io/library/python:3.12.12-slim-bookworm@sha256:...
ARG BASE=docker.io/library/python:3.12.12-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
# The lock has the extras jwt, otel, redis and tls; no others are in the image. What changes least
# comes first, so that a change of the code installs no dependency again. The environment gets no
# pip of its own: nothing is installed in a running container.
COPY requirements.lock requirements-build.lock ./
RUN python -m venv --without-pip /opt/clevrd \
 && pip --python /opt/clevrd/bin/python install --no-cache-dir --disable-pip-version-check \
    --no-deps --require-hashes -r requirements.lock \
 && pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
    --no-deps --require-hashes -r requirements-build.lock
COPY pyproject.toml setup.py README.md LICENSE ./
COPY clevrd clevrd
RUN pip wheel --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation -w . . \
 && pip --python /opt/clevrd/bin/python install --no-cache-dir --disable-pip-version-check \
    --no-deps clevrd-*.whl \
 && pip --python /opt/clevrd/bin/python check

FROM ${BASE}
LABEL org.opencontainers.image.title="clevrd" \
      org.opencontainers.image.description="A real-time event streaming daemon" \
      org.opencontainers.image.licenses="MIT"
# At the same path as it was made: an environment can't be moved.
COPY --from=build /opt/clevrd /opt/clevrd
# A named volume takes its owner from here. The imports leave the bytecode of what they need of the
# standard library, 4 MB, which the base has none of and the daemon's user can't write: without it
# each start compiles for a second, and each health check for a tenth of one.
RUN install -d -m 0700 -o 10001 -g 10001 /var/lib/clevrd \
 && /opt/clevrd/bin/python -c 'import clevrd.server.process, clevrd.entry, clevrd.health_check, \
clevrd.cli.publish, clevrd.cli.subscribe, clevrd.cli.checkconfig, clevrd.cli.serve, tomllib'
ENV PATH=/opt/clevrd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ADDRESS=:8080
# By number, so that Kubernetes' runAsNonRoot can see that it is not root.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# It asks where the daemon listens, over TLS where that has a certificate: by ADDRESS, CLEVRD_CONFIG, or
# the flags of process 1.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 CMD ["clevrd", "health"]
ENTRYPOINT ["clevrd"]
CMD ["serve"]
