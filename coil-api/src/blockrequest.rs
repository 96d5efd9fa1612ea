//! `BlockRequest`: a node asks for a block of a pool.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, CustomResourceExt};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Condition: the request is answered, for good or ill.
pub const COMPLETE: &str = "Complete";
/// Condition: the answer is no.
pub const FAILED: &str = "Failed";

/// Reason of [`COMPLETE`] beside a block.
pub const REASON_ALLOCATED: &str = "allocated";
/// Reason of [`COMPLETE`] beside [`FAILED`].
pub const REASON_COMPLETED_WITH_FAILURE: &str = "completed with failure";
/// Reason of [`FAILED`]: no block of the pool is free, or the pool is being deleted.
pub const REASON_OUT_OF_BLOCKS: &str = "out of blocks";
/// Reason of [`FAILED`]: nothing is carved from a pool that is not valid.
pub const REASON_INVALID_POOL: &str = "invalid pool";
/// Reason of [`FAILED`]: there is no such pool.
pub const REASON_POOL_NOT_FOUND: &str = "pool not found";

/// What a node asks for.
#[derive(CustomResource, JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[kube(
    group = "coil.cybozu.com",
    version = "v2",
    kind = "BlockRequest",
    plural = "blockrequests",
    singular = "blockrequest",
    status = "BlockRequestStatus",
    derive = "PartialEq",
    doc = "BlockRequest asks for a block of an AddressPool for a node."
)]
#[serde(rename_all = "camelCase")]
pub struct BlockRequestSpec {
    /// Name of the node.
    pub node_name: String,
    /// Name of the pool.
    pub pool_name: String,
}

/// The answer.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct BlockRequestStatus {
    /// Name of the block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_block_name: Option<String>,
    /// `Complete`, `Failed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<BlockRequestCondition>,
}

/// A condition of a request; older than the one that the rest of Kubernetes shares.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct BlockRequestCondition {
    /// [`COMPLETE`] or [`FAILED`].
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// When it was looked at.
    #[serde(default)]
    pub last_probe_time: Option<Time>,
    /// When the status changed.
    #[serde(default)]
    pub last_transition_time: Option<Time>,
    /// Reason, one of this module's constants.
    #[serde(default)]
    pub reason: String,
    /// For people.
    #[serde(default)]
    pub message: String,
}

/// Why a request has no block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The answer is no.
    #[error("{reason}")]
    Failed {
        /// Reason of the condition [`FAILED`].
        reason: String,
    },
    /// There is no answer yet.
    #[error("request is in progress")]
    InProgress,
    /// There is an answer that names no block.
    #[error("request is complete but names no block")]
    NoBlock,
}

impl BlockRequest {
    /// Name of the block that the request was answered with.
    ///
    /// # Errors
    /// There is no answer yet, or it is no.
    pub fn result(&self) -> Result<&str, RequestError> {
        self.status.as_ref().ok_or(RequestError::InProgress)?.result()
    }

    /// Whether nobody has answered yet.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.status.as_ref().is_none_or(|status| status.conditions.is_empty())
    }
}

impl BlockRequestStatus {
    /// The answer that names a block.
    #[must_use]
    pub fn allocated(block: &str, now: &Time) -> Self {
        let message = format!("allocated block {block}");
        Self {
            address_block_name: Some(block.to_owned()),
            conditions: vec![BlockRequestCondition::holds(COMPLETE, REASON_ALLOCATED, &message, now)],
        }
    }

    /// The answer no.
    #[must_use]
    pub fn failed(reason: &str, message: &str, now: &Time) -> Self {
        Self {
            address_block_name: None,
            conditions: vec![
                BlockRequestCondition::holds(COMPLETE, REASON_COMPLETED_WITH_FAILURE, message, now),
                BlockRequestCondition::holds(FAILED, reason, message, now),
            ],
        }
    }

    /// As [`BlockRequest::result`].
    ///
    /// # Errors
    /// There is no answer yet, or it is no.
    pub fn result(&self) -> Result<&str, RequestError> {
        let holds = |kind: &str| self.conditions.iter().find(|c| c.type_ == kind && c.status == "True");
        if let Some(failed) = holds(FAILED) {
            return Err(RequestError::Failed { reason: failed.reason.clone() });
        }
        holds(COMPLETE).ok_or(RequestError::InProgress)?;
        self.address_block_name.as_deref().filter(|name| !name.is_empty()).ok_or(RequestError::NoBlock)
    }
}

impl BlockRequestCondition {
    fn holds(kind: &str, reason: &str, message: &str, now: &Time) -> Self {
        Self {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            last_probe_time: Some(now.clone()),
            last_transition_time: Some(now.clone()),
            reason: reason.to_owned(),
            message: message.to_owned(),
        }
    }
}

/// The CustomResourceDefinition of BlockRequest.
#[must_use]
pub fn crd() -> CustomResourceDefinition {
    let mut crd = BlockRequest::crd();
    crate::names::label(&mut crd.metadata);
    crd
}

fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Complete: the request is answered. Failed: the answer is no.",
        "type": "array",
        "items": {
            "type": "object",
            "required": ["type", "status"],
            "properties": {
                "type": { "type": "string" },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                "lastProbeTime": { "type": "string", "format": "date-time", "nullable": true },
                "lastTransitionTime": { "type": "string", "format": "date-time", "nullable": true },
                "reason": { "type": "string" },
                "message": { "type": "string" },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use k8s_openapi::jiff::Timestamp;
    use serde_json::{Value, json};

    fn request(status: Value) -> BlockRequest {
        let spec = json!({ "nodeName": "node1", "poolName": "default" });
        serde_json::from_value(json!({ "metadata": { "name": "r" }, "spec": spec, "status": status }))
            .unwrap()
    }

    fn condition(kind: &str, status: &str) -> Value {
        json!({ "type": kind, "status": status, "reason": "why", "message": "",
                "lastProbeTime": null, "lastTransitionTime": "2026-01-01T00:00:00Z" })
    }

    #[test]
    fn a17_result_of_a_request() {
        let of = |conditions: &[Value]| {
            let request = request(json!({ "addressBlockName": "default-0", "conditions": conditions }));
            request.result().map(str::to_owned)
        };
        let why = || Err(RequestError::Failed { reason: "why".to_owned() });
        let block = || Ok("default-0".to_owned());
        let complete = condition("Complete", "True");
        assert_eq!(of(std::slice::from_ref(&complete)), block());
        assert_eq!(of(&[complete.clone(), condition("Failed", "False")]), block());
        assert_eq!(of(&[complete, condition("Failed", "True")]), why());
        assert_eq!(of(&[condition("Complete", "False")]), Err(RequestError::InProgress));
        assert_eq!(of(&[]), Err(RequestError::InProgress));
        assert_eq!(of(&[condition("Failed", "True")]), why());
        // The original takes an answer without a name for a block without a name.
        let nameless = request(json!({ "conditions": [condition("Complete", "True")] }));
        assert_eq!(nameless.result(), Err(RequestError::NoBlock));
        assert_eq!(request(Value::Null).result(), Err(RequestError::InProgress));
    }

    #[test]
    fn answers_say_what_they_mean() {
        let now = Time(Timestamp::from_second(0).unwrap());
        assert_eq!(BlockRequestStatus::allocated("default-3", &now).result(), Ok("default-3"));
        let no = BlockRequestStatus::failed(REASON_OUT_OF_BLOCKS, "no block of pool default is free", &now);
        let reason = REASON_OUT_OF_BLOCKS.to_owned();
        assert_eq!(no.result(), Err(RequestError::Failed { reason }));
        let reasons: Vec<_> = no.conditions.iter().map(|c| (c.type_.as_str(), c.reason.as_str())).collect();
        assert_eq!(reasons, [("Complete", "completed with failure"), ("Failed", "out of blocks")]);
        assert!(request(Value::Null).is_pending());
        assert!(!request(serde_json::to_value(&no).unwrap()).is_pending());
    }
}
