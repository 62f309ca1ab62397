# clevrd in a container: docker build -t clevrd . && docker run -p 127.0.0.1:8080:8080 clevrd
# The daemon keeps no files, so --read-only --cap-drop=ALL is right for it. To carry topics over a
# planned restart: -e CLEVRD_STATE_DIR=/var/lib/clevrd -v clevrd-state:/var/lib/clevrd

FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY clevrd clevrd
# The environment gets no pip of its own: nothing is installed in a running container.
RUN python -m venv --without-pip /opt/clevrd \
 && pip --python /opt/clevrd/bin/python install --no-cache-dir --disable-pip-version-check .

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="clevrd" \
      org.opencontainers.image.description="A real-time event streaming daemon" \
      org.opencontainers.image.licenses="MIT"
# At the same path as it was made: an environment can't be moved.
COPY --from=build /opt/clevrd /opt/clevrd
# A named volume takes its owner from here.
RUN install -d -m 0700 -o 10001 -g 10001 /var/lib/clevrd
ENV PATH=/opt/clevrd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ADDRESS=:8080
# By number, so that Kubernetes' runAsNonRoot can see that it is not root.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# It asks where the daemon listens: ADDRESS, CLEVRD_CONFIG, or the flags of process 1.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 CMD ["clevrd", "health"]
ENTRYPOINT ["clevrd"]
CMD ["serve"]
