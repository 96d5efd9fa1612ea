//! Groups, labels, annotations, finalizers and fixed object names.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// API group of all custom resources.
pub const GROUP: &str = "coil.cybozu.com";
/// API version of all custom resources.
pub const VERSION: &str = "v2";

/// Finalizer of objects whose deletion must be prepared.
pub const FINALIZER: &str = "coil.cybozu.com";

/// Label: name of the product, value [`APP_NAME`].
pub const LABEL_APP_NAME: &str = "app.kubernetes.io/name";
/// Label: name of the Egress that an object belongs to.
pub const LABEL_APP_INSTANCE: &str = "app.kubernetes.io/instance";
/// Label: part of the product.
pub const LABEL_APP_COMPONENT: &str = "app.kubernetes.io/component";
/// Value of [`LABEL_APP_NAME`].
pub const APP_NAME: &str = "coil";
/// Value of [`LABEL_APP_COMPONENT`] for everything that belongs to an Egress.
pub const COMPONENT_EGRESS: &str = "egress";

/// Namespace annotation: address pool of pods created later.
pub const ANNOTATION_POOL: &str = "coil.cybozu.com/pool";
/// Label of an AddressBlock: name of its pool.
pub const LABEL_POOL: &str = "coil.cybozu.com/pool";
/// Label of an AddressBlock: name of its node.
pub const LABEL_NODE: &str = "coil.cybozu.com/node";
/// Label of an AddressBlock: UID of the BlockRequest that it answers.
pub const LABEL_REQUEST: &str = "coil.cybozu.com/request";
/// Label of an AddressBlock: [`RESERVED`] if no address of it may be given out.
pub const LABEL_RESERVED: &str = "coil.cybozu.com/reserved";
/// Value of [`LABEL_RESERVED`].
pub const RESERVED: &str = "true";
/// Pool of pods whose namespace names none.
pub const DEFAULT_POOL: &str = "default";

/// Pod annotation, followed by the namespace of the Egresses: a comma-separated list of Egress names.
pub const ANNOTATION_EGRESS_PREFIX: &str = "egress.coil.cybozu.com/";

/// Label of an EndpointSlice: name of its Service.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Label of a Node: its zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";

/// ServiceAccount of egress pods, ClusterRole and ClusterRoleBinding for them.
pub const EGRESS_SERVICE_ACCOUNT: &str = "coil-egress";
/// Container of egress pods that Coil owns.
pub const EGRESS_CONTAINER: &str = "egress";

/// Name of a block of a pool.
#[must_use]
pub fn block_name(pool: &str, index: u32) -> String {
    format!("{pool}-{index}")
}

/// Name of the request of a node for a block of a pool.
#[must_use]
pub fn request_name(pool: &str, node: &str) -> String {
    format!("req-{pool}-{node}")
}

/// Marks an object as part of the product.
pub(crate) fn label(metadata: &mut ObjectMeta) {
    metadata.labels.get_or_insert_default().insert(LABEL_APP_NAME.to_owned(), APP_NAME.to_owned());
}

/// Name of the annotation that makes a pod a client of Egresses of `namespace`.
#[must_use]
pub fn egress_annotation(namespace: &str) -> String {
    format!("{ANNOTATION_EGRESS_PREFIX}{namespace}")
}

/// Labels of every object that belongs to the Egress `name`; also the selector of its pods and slices.
#[must_use]
pub fn egress_labels(name: &str) -> BTreeMap<String, String> {
    [(LABEL_APP_NAME, APP_NAME), (LABEL_APP_INSTANCE, name), (LABEL_APP_COMPONENT, COMPONENT_EGRESS)]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// [`egress_labels`] as a label-selector string, sorted by key.
#[must_use]
pub fn egress_selector(name: &str) -> String {
    format!(
        "{LABEL_APP_COMPONENT}={COMPONENT_EGRESS},{LABEL_APP_INSTANCE}={name},{LABEL_APP_NAME}={APP_NAME}"
    )
}
