"""An S3 server on this machine, for tests: moto's, in a thread, with one empty bucket."""

import logging
from types import TracebackType

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "features"


class ObjectServer:
    """Runs in a `with` block.

    Attributes:
        url: of the bucket.
        options: by which obstore reaches it.
        client: boto3's, to look at the bucket by other means than the code under test.
    """

    def __enter__(self) -> "ObjectServer":
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it writes a line for every request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        endpoint, key = f"http://{host}:{port}", "test"
        self.client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=key, region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=BUCKET)
        self.url = f"s3://{BUCKET}"
        self.options = {
            "endpoint": endpoint,
            "access_key_id": key,
            "secret_access_key": key,
            "region": "us-east-1",
            "client_options": {"allow_http": True},
            "retry_config": {"max_retries": 1},
        }
        return self

    def __exit__(self, *_: type | BaseException | TracebackType | None) -> None:
        self.client.close()
        self._server.stop()

    def keys(self, prefix: str) -> list[str]:
        """Every key that begins so, as S3 itself lists them."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in found.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)
