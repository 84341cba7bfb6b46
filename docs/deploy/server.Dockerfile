# The operator's hub. Built from the repository's root, with BuildKit:
#   docker build -f docs/deploy/server.Dockerfile -t metarisk-server .
# The image holds no key and no secret. The consortium's folder is a volume, owned by user 10001 and made once:
#   docker run --rm -v consortium:/var/lib/metarisk metarisk-server \
#     metarisk-server init /var/lib/metarisk/consortium --name NAME --address HOST
#   docker run -d --name hub -v consortium:/var/lib/metarisk -p 9092:9092 --read-only --tmpfs /tmp --cap-drop ALL \
#     --security-opt no-new-privileges --ulimit core=0 --stop-timeout 90 metarisk-server
# Other commands run inside, where the loopback door is: docker exec hub metarisk-server status --folder consortium

FROM python:3.11-slim AS build
WORKDIR /build
RUN python -m venv /opt/metarisk
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/build/requirements.lock
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY metarisk_common metarisk_common
COPY server server
COPY client client
COPY simulations simulations
RUN ["/opt/metarisk/bin/pip", "install", "."]

FROM python:3.11-slim
RUN groupadd --gid 10001 metarisk \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/metarisk --shell /usr/sbin/nologin metarisk \
    && install -d -o metarisk -g metarisk -m 0700 /var/lib/metarisk
COPY --from=build /opt/metarisk /opt/metarisk
ENV PATH=/opt/metarisk/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/metarisk
VOLUME ["/var/lib/metarisk"]
EXPOSE 9092
STOPSIGNAL SIGTERM
# What a bank sees: the outside door answers, over TLS, with a certificate of the consortium's own authority.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "-c", "import ssl, urllib.request as u; u.urlopen('https://127.0.0.1:9092/health', timeout=8, context=ssl.create_default_context(cafile='consortium/certificates/ca.pem'))"]
CMD ["metarisk-server", "up", "/var/lib/metarisk/consortium"]
