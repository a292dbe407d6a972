output "workspace" {
  description = "The workspace URI for CONVOY_WORKSPACE."
  value       = "s3://${aws_s3_bucket.workspace.id}/${var.prefix}"
}

output "pod_role_arn" {
  description = "For the annotation of infra/kuberay/service-accounts.yaml."
  value       = one(aws_iam_role.pods[*].arn)
}

output "instance_profiles" {
  description = "For IamInstanceProfile of cluster.yaml."
  value       = [for profile in aws_iam_instance_profile.machine : profile.name]
}
