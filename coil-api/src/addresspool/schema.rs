//! Parts of the schema that types alone do not say: bounds and CEL rules.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::{AddressPool, DEFAULT_BLOCK_SIZE_BITS, MAX_BLOCK_SIZE_BITS, MAX_SUBNETS};

/// The CustomResourceDefinition of AddressPool.
#[must_use]
pub fn crd() -> CustomResourceDefinition {
    let mut crd = AddressPool::crd();
    crate::names::label(&mut crd.metadata);
    for version in &mut crd.spec.versions {
        let spec = version
            .schema
            .as_mut()
            .and_then(|schema| schema.open_api_v3_schema.as_mut())
            .and_then(|schema| schema.properties.as_mut())
            .and_then(|properties| properties.get_mut("spec"));
        if let Some(spec) = spec {
            let rules = serde_json::from_value(rules());
            spec.x_kubernetes_validations = Some(rules.expect("the rules are rules"));
        }
    }
    crd
}

pub(super) fn block_size_bits(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Power of two of the number of addresses in a block. Cannot be changed.",
        "type": "integer",
        "format": "int32",
        "minimum": 0,
        "maximum": MAX_BLOCK_SIZE_BITS,
        "default": DEFAULT_BLOCK_SIZE_BITS,
        "x-kubernetes-validations": [{
            "rule": "self == oldSelf",
            "message": "unchangeable",
            "reason": "FieldValueForbidden",
        }],
    })
}

pub(super) fn subnets(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Networks, all with the same families. More can be appended; nothing else can be changed.",
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_SUBNETS,
        "x-kubernetes-list-type": "atomic",
        "items": {
            "type": "object",
            "properties": {
                "ipv4": network("An IPv4 network in CIDR notation.", 4, 18),
                "ipv6": network("An IPv6 network in CIDR notation.", 6, 43),
            },
            "x-kubernetes-validations": [
                {
                    "rule": "has(self.ipv4) || has(self.ipv6)",
                    "message": "invalid subnet: ipv4 or ipv6 is required",
                },
                {
                    "rule": "!has(self.ipv4) || !has(self.ipv6) || !isCIDR(self.ipv4) || !isCIDR(self.ipv6) || cidr(self.ipv6).prefixLength() - cidr(self.ipv4).prefixLength() == 96",
                    "message": "dual stack subnet must be the same size",
                },
            ],
        },
    })
}

fn network(description: &str, family: u8, longest: usize) -> Value {
    json!({
        "description": description,
        "type": "string",
        "minLength": 1,
        "maxLength": longest,
        "x-kubernetes-validations": [{
            "rule": format!("isCIDR(self) && cidr(self).ip().family() == {family}"),
            "message": format!("invalid IPv{family} subnet"),
        }],
    })
}

/// Rules that look at more than one field. What is no network has a rule of its own.
fn rules() -> Value {
    let each = |family: &str, rule: &str| {
        format!(
            "(!has(s.{family}) || !isCIDR(s.{family}) || {})",
            rule.replace("NET", &format!("s.{family}"))
        )
    };
    let narrow = format!(
        "self.subnets.all(s, {} && {})",
        each("ipv4", "cidr(NET).prefixLength() + self.blockSizeBits <= 32"),
        each("ipv6", "cidr(NET).prefixLength() + self.blockSizeBits <= 128"),
    );
    let apart = |family: &str| {
        format!(
            "self.subnets.all(a, !has(a.{family}) || !isCIDR(a.{family}) || self.subnets.exists_one(b, \
             has(b.{family}) && isCIDR(b.{family}) && (cidr(a.{family}).containsCIDR(b.{family}) || \
             cidr(b.{family}).containsCIDR(a.{family}))))"
        )
    };
    json!([
        { "rule": narrow, "message": "too narrow subnet: every subnet must have room for a block" },
        {
            "rule": "self.subnets.all(s, has(s.ipv4) == has(self.subnets[0].ipv4) && has(s.ipv6) == has(self.subnets[0].ipv6))",
            "message": "all subnets of a pool must have the same families",
        },
        { "rule": apart("ipv4"), "message": "IPv4 subnets of a pool must not overlap" },
        { "rule": apart("ipv6"), "message": "IPv6 subnets of a pool must not overlap" },
        {
            "rule": "self.subnets.size() >= oldSelf.subnets.size()",
            "message": "unshrinkable",
            "reason": "FieldValueForbidden",
            "fieldPath": ".subnets",
        },
        {
            // No subnet is there twice. So the old ones are there in the old order, and as the last of them
            // has kept its place, none has another before it that is new.
            "rule": "self.subnets.size() < oldSelf.subnets.size() || \
                (self.subnets.filter(s, s in oldSelf.subnets) == oldSelf.subnets && \
                self.subnets[oldSelf.subnets.size() - 1] == oldSelf.subnets[oldSelf.subnets.size() - 1])",
            "message": "unchangeable: subnets can only be appended",
            "reason": "FieldValueForbidden",
            "fieldPath": ".subnets",
        },
    ])
}
