"""Makes S3 buckets, each with a user of its own: ``make_buckets.py BUCKET=FILE ...``. May be run again.

Each FILE, of the form of AWS's own (profile ``default``), holds the keys of a user who may use that bucket and no
other. The root user's keys, with which all of this is done, come from where boto3 looks for them, and the address of
the server from AWS_ENDPOINT_URL_S3. Buckets and policies are plain S3; users are VersityGW's own admin interface.
"""

from __future__ import annotations

import configparser
import json
import sys
from typing import Any
from xml.sax.saxutils import escape

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ClientError
from botocore.httpsession import URLLib3Session

CREATED, EXISTS = 201, 409


def read_keys(file: str) -> tuple[str, str]:
    """Access key and secret key of a credentials file."""
    found = configparser.ConfigParser(interpolation=None)
    with open(file, encoding="utf-8") as text:
        found.read_file(text)
    return found["default"]["aws_access_key_id"], found["default"]["aws_secret_access_key"]


def make_user(s3: Any, access: str, secret: str) -> None:
    """A user who owns nothing and may make no bucket. Raises SystemExit with the server's answer where it refuses."""
    account = f"<Account><Access>{escape(access)}</Access><Secret>{escape(secret)}</Secret><Role>user</Role></Account>"
    request = AWSRequest("PATCH", f"{s3.meta.endpoint_url}/create-user", data=account.encode())
    root = boto3.Session().get_credentials()
    S3SigV4Auth(root, "s3", s3.meta.region_name).add_auth(request)
    answer = URLLib3Session().send(request.prepare())
    if answer.status_code not in (CREATED, EXISTS):
        raise SystemExit(f"the user of {access} could not be made: {answer.status_code} {answer.text}")


def make_bucket(s3: Any, bucket: str, access: str) -> None:
    """A bucket for the user with this access key alone; for root too, whom no policy binds."""
    try:
        s3.create_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise
    own = {
        "Effect": "Allow",
        "Principal": {"AWS": [access]},
        "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket", "s3:GetBucketLocation",
                   "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts", "s3:ListBucketMultipartUploads"],
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }  # fmt: skip
    s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [own]}))


def main(arguments: list[str]) -> None:
    """The command."""
    s3 = boto3.client("s3")
    for argument in arguments:
        bucket, _, file = argument.partition("=")
        access, secret = read_keys(file)
        make_user(s3, access, secret)
        make_bucket(s3, bucket, access)
        print(f"bucket {bucket} is there, for the user of {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
