variable "name" {
  description = "Prefix of all names; the cluster_name of cluster.yaml."
  type        = string
  default     = "convoy"
}

variable "region" {
  description = "Where bucket and machines are, like eu-central-1."
  type        = string
}

variable "account_id" {
  description = "The account that owns them."
  type        = string
}

variable "bucket" {
  description = "Name of the workspace's bucket."
  type        = string
}

variable "prefix" {
  description = "Prefix of the workspace in the bucket, with its closing slash; empty for the whole bucket."
  type        = string
  default     = ""
}

variable "source_bucket_arns" {
  description = "Buckets that jobs read images from."
  type        = list(string)
  default     = []
}

variable "oidc_provider_arn" {
  description = "The identity provider of the Kubernetes cluster; null where there is none."
  type        = string
  default     = null
}

variable "oidc_issuer" {
  description = "Its issuer, without https://."
  type        = string
  default     = ""
}

variable "namespace" {
  description = "Where the pods run."
  type        = string
  default     = "convoy"
}
