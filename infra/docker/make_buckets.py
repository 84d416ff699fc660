"""Makes the S3 buckets named on the command line, where they are missing. The endpoint is in AWS_ENDPOINT_URL_S3."""

import sys

import boto3
from botocore.exceptions import ClientError

s3 = boto3.client("s3")
for bucket in sys.argv[1:]:
    try:
        s3.create_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise
    s3.head_bucket(Bucket=bucket)  # also says whether the keys may use it
    print(f"bucket {bucket} is there")
