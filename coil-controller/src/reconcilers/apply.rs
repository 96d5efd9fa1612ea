//! Reading and writing the children of an Egress.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;

use coil_api::names;

use crate::error::ReconcileError;
use crate::plan::egress::{Child, Observed, Write};

/// Name under which our writes appear in `managedFields`.
pub(crate) const FIELD_MANAGER: &str = "coil-controller";

/// What a write did.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    pub(crate) operation: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) name: String,
    /// Metadata of the answer and digest of what was asked for.
    pub(crate) answer: Option<(ObjectMeta, u64)>,
}

/// Fetches the children of an Egress.
pub(crate) async fn observe(
    client: &Client,
    namespace: &str,
    name: &str,
) -> Result<Observed, ReconcileError> {
    Ok(Observed {
        deployment: get::<Deployment>(client, namespace, name).await?,
        service: get::<Service>(client, namespace, name).await?,
        budget: get::<PodDisruptionBudget>(client, namespace, name).await?,
    })
}

/// Makes sure that the ServiceAccount of egress pods exists. It belongs to all Egresses of the namespace
/// and is never removed.
pub(crate) async fn ensure_service_account(
    client: &Client,
    namespace: &str,
) -> Result<Option<Done>, ReconcileError> {
    let name = names::EGRESS_SERVICE_ACCOUNT;
    if get::<ServiceAccount>(client, namespace, name).await?.is_some() {
        return Ok(None);
    }
    let metadata = ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some([(names::LABEL_APP_NAME.to_owned(), names::APP_NAME.to_owned())].into()),
        ..ObjectMeta::default()
    };
    let account = ServiceAccount { metadata, ..ServiceAccount::default() };
    match create(client, namespace, name, &account).await {
        Ok(_) => Ok(Some(Done {
            operation: "create",
            kind: "ServiceAccount",
            name: name.to_owned(),
            answer: None,
        })),
        // Another Egress of the namespace was faster.
        Err(error) if error.is_conflict() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Carries out one change.
pub(crate) async fn carry_out(
    client: &Client,
    namespace: &str,
    name: &str,
    write: Write,
) -> Result<Done, ReconcileError> {
    let (operation, kind, answer) = match write {
        Write::Create { child, digest } => {
            let (kind, metadata) = match child {
                Child::Deployment(d) => ("Deployment", create(client, namespace, name, &*d).await?.metadata),
                Child::Service(s) => ("Service", create(client, namespace, name, &*s).await?.metadata),
                Child::Budget(b) => {
                    ("PodDisruptionBudget", create(client, namespace, name, &*b).await?.metadata)
                }
            };
            ("create", kind, Some((metadata, digest)))
        }
        Write::Replace { child, digest } => {
            let (kind, metadata) = match child {
                Child::Deployment(d) => ("Deployment", replace(client, namespace, name, &*d).await?.metadata),
                Child::Service(s) => ("Service", replace(client, namespace, name, &*s).await?.metadata),
                Child::Budget(b) => {
                    ("PodDisruptionBudget", replace(client, namespace, name, &*b).await?.metadata)
                }
            };
            ("update", kind, Some((metadata, digest)))
        }
        Write::DeleteBudget { metadata } => {
            delete::<PodDisruptionBudget>(client, namespace, name, &metadata).await?;
            ("delete", "PodDisruptionBudget", None)
        }
        Write::Await { kind, name } => return Err(ReconcileError::Former { kind, name }),
        Write::Refuse { kind, name } => return Err(ReconcileError::NotOurs { kind, name }),
    };
    Ok(Done { operation, kind, name: name.to_owned(), answer })
}

trait Named: Resource<DynamicType = (), Scope = NamespaceResourceScope> {}
impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + k8s_openapi::Resource> Named for K {}

async fn get<K>(client: &Client, namespace: &str, name: &str) -> Result<Option<K>, ReconcileError>
where
    K: Named + k8s_openapi::Resource + Clone + DeserializeOwned + Debug,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    api.get_opt(name).await.map_err(ReconcileError::api("get", K::KIND, &path(namespace, name)))
}

async fn create<K>(client: &Client, namespace: &str, name: &str, object: &K) -> Result<K, ReconcileError>
where
    K: Named + k8s_openapi::Resource + Clone + DeserializeOwned + Serialize + Debug,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let result = api.create(&parameters(), object).await;
    result.map_err(ReconcileError::api("create", K::KIND, &path(namespace, name)))
}

async fn replace<K>(client: &Client, namespace: &str, name: &str, object: &K) -> Result<K, ReconcileError>
where
    K: Named + k8s_openapi::Resource + Clone + DeserializeOwned + Serialize + Debug,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let result = api.replace(name, &parameters(), object).await;
    result.map_err(ReconcileError::api("update", K::KIND, &path(namespace, name)))
}

async fn delete<K>(
    client: &Client,
    namespace: &str,
    name: &str,
    observed: &ObjectMeta,
) -> Result<(), ReconcileError>
where
    K: Named + k8s_openapi::Resource + Clone + DeserializeOwned + Debug,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let preconditions = Preconditions { uid: observed.uid.clone(), resource_version: None };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match api.delete(name, &parameters).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(ReconcileError::api("delete", K::KIND, &path(namespace, name))(error)),
    }
}

fn parameters() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

fn path(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}
