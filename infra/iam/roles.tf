# What a job needs of the store: list, read and write the workspace; read the sources of its images.
data "aws_iam_policy_document" "job" {
  statement {
    sid       = "ListWorkspace"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation"]
    resources = [aws_s3_bucket.workspace.arn]
  }
  statement {
    sid       = "UseWorkspace"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${aws_s3_bucket.workspace.arn}/${var.prefix}*"]
  }
  dynamic "statement" {
    for_each = length(var.source_bucket_arns) > 0 ? [1] : []
    content {
      sid       = "ListSources"
      actions   = ["s3:ListBucket", "s3:GetBucketLocation"]
      resources = var.source_bucket_arns
    }
  }
  dynamic "statement" {
    for_each = length(var.source_bucket_arns) > 0 ? [1] : []
    content {
      sid       = "ReadSources"
      actions   = ["s3:GetObject"]
      resources = [for arn in var.source_bucket_arns : "${arn}/*"]
    }
  }
}

resource "aws_iam_policy" "job" {
  name   = "${var.name}-job"
  policy = data.aws_iam_policy_document.job.json
}

# Pods of Kubernetes take this role by their service account.
data "aws_iam_policy_document" "pods" {
  count = var.oidc_provider_arn == null ? 0 : 1
  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]
    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }
    condition {
      test     = "StringEquals"
      variable = "${var.oidc_issuer}:sub"
      values   = [for account in ["convoy-head", "convoy-worker"] : "system:serviceaccount:${var.namespace}:${account}"]
    }
    condition {
      test     = "StringEquals"
      variable = "${var.oidc_issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "pods" {
  count              = var.oidc_provider_arn == null ? 0 : 1
  name               = "${var.name}-job"
  assume_role_policy = data.aws_iam_policy_document.pods[0].json
}

resource "aws_iam_role_policy_attachment" "pods" {
  count      = var.oidc_provider_arn == null ? 0 : 1
  role       = aws_iam_role.pods[0].name
  policy_arn = aws_iam_policy.job.arn
}

# Machines of `ray up` take theirs by an instance profile.
data "aws_iam_policy_document" "machines" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "token" {
  statement {
    sid       = "ReadClusterToken"
    actions   = ["ssm:GetParameter"]
    resources = ["arn:aws:ssm:${var.region}:${var.account_id}:parameter/convoy/ray-auth-token"]
  }
  statement {
    sid       = "PullImages"
    actions   = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    resources = ["arn:aws:ecr:${var.region}:${var.account_id}:repository/convoy"]
  }
  statement {
    sid       = "LogInToRegistry"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"] # this action knows no resource
  }
}

# The head starts and ends machines, but only those that carry the cluster's tag, and hands them the workers' role only.
data "aws_iam_policy_document" "autoscaler" {
  statement {
    sid       = "Look"
    actions   = ["ec2:DescribeInstances", "ec2:DescribeImages", "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:DescribeKeyPairs"]
    resources = ["*"] # these actions know no resource
  }
  statement {
    sid       = "StartWorkers"
    actions   = ["ec2:RunInstances", "ec2:CreateTags"]
    resources = ["arn:aws:ec2:${var.region}:*:*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestedRegion"
      values   = [var.region]
    }
  }
  statement {
    sid       = "EndWorkers"
    actions   = ["ec2:TerminateInstances"]
    resources = ["arn:aws:ec2:${var.region}:${var.account_id}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid       = "GiveWorkersTheirRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.machine["worker"].arn]
  }
  statement {
    sid       = "FindMachineImages"
    actions   = ["ssm:GetParameters"] # EC2 asks in the caller's name for an ImageId of resolve:ssm
    resources = ["arn:aws:ssm:${var.region}::parameter/aws/service/*"]
  }
}

resource "aws_iam_role" "machine" {
  for_each           = toset(["head", "worker"])
  name               = "${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.machines.json
}

resource "aws_iam_instance_profile" "machine" {
  for_each = aws_iam_role.machine
  name     = each.value.name
  role     = each.value.name
}

resource "aws_iam_role_policy_attachment" "machine_job" {
  for_each   = aws_iam_role.machine
  role       = each.value.name
  policy_arn = aws_iam_policy.job.arn
}

resource "aws_iam_role_policy" "machine_token" {
  for_each = aws_iam_role.machine
  name     = "token"
  role     = each.value.name
  policy   = data.aws_iam_policy_document.token.json
}

resource "aws_iam_role_policy" "autoscaler" {
  name   = "autoscaler"
  role   = aws_iam_role.machine["head"].name
  policy = data.aws_iam_policy_document.autoscaler.json
}
