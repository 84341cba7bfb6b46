# A bank's daemon. Built from the repository's root, with BuildKit:
#   docker build -f docs/deploy/client.Dockerfile -t metarisk-client .
# The image holds no key, no secret and no record. The bank's folder is a volume, owned by user 10001; the table is
# mounted to be read only. The folder is made once:
#   docker run --rm -v bank:/var/lib/metarisk -v /srv/loans:/srv/loans:ro -v /srv/consortium:/srv/consortium:ro \
#     metarisk-client metarisk-client init /var/lib/metarisk/bank --name NAME --data /srv/loans/loans.parquet \
#     --declared-size 5000 --epsilon 3 --server HOST:9092 --ca /srv/consortium/ca.pem --yes
#   docker run -d --name bank -v bank:/var/lib/metarisk -v /srv/loans:/srv/loans:ro --read-only --tmpfs /tmp \
#     --cap-drop ALL --security-opt no-new-privileges --ulimit core=0 --stop-timeout 660 metarisk-client
# No port is published: a bank only calls. Other commands: docker exec -it bank metarisk-client status bank

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
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5m --timeout=60s --start-period=2m CMD ["python", "-c", "import json, subprocess, sys; sys.exit(not json.loads(subprocess.check_output(['metarisk-client', 'status', 'bank', '--json']))['served'])"]
CMD ["metarisk-client", "up", "/var/lib/metarisk/bank"]
