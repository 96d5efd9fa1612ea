//! Blocks, pools and requests in the Kubernetes API: one call each, all with a limit of time.
//!
//! Nothing is read from a cache. What one call did is seen by the next: a request that was not answered may
//! have been carried out, so that each can be made again.

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use coil_api::blockrequest::{REASON_OUT_OF_BLOCKS, RequestError};
use coil_api::{AddressBlock, AddressPool, BlockRequest, BlockRequestSpec, names};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{
    DeleteParams, ListParams, ObjectMeta, PartialObjectMeta, Patch, PatchParams, PostParams, Preconditions,
};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;

use super::block::Range;
use super::core::Released;
use super::demand::{Answer, RequestView};
use super::ledger::BlockView;

/// Time for one call.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a call is made again whose object has changed in the meantime.
const ATTEMPTS: u32 = 8;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The API server refused, or cannot be reached.
    #[error("failed to {operation} {subject}")]
    Call {
        /// What was asked for.
        operation: &'static str,
        /// About what.
        subject: String,
        /// The answer.
        #[source]
        source: Box<kube::Error>,
    },
    /// There was no answer.
    #[error("failed to {operation} {subject}: no answer from the API server")]
    Silent {
        /// What was asked for.
        operation: &'static str,
        /// About what.
        subject: String,
    },
    /// Others have changed the object each time.
    #[error("failed to {operation} {subject}: others are changing it")]
    Busy {
        /// What was asked for.
        operation: &'static str,
        /// About what.
        subject: String,
    },
}

/// The API as one node needs it.
pub trait BlockApi: Send + Sync + 'static {
    /// What a call fails with.
    type Error: Error + Send + Sync + 'static;

    /// All blocks of this node.
    fn blocks(&self) -> impl Future<Output = Result<Vec<BlockView>, Self::Error>> + Send;

    /// A block, if it exists and is this node's.
    fn block(&self, name: &str) -> impl Future<Output = Result<Option<BlockView>, Self::Error>> + Send;

    /// Whether a pool is being deleted, if it exists.
    fn pool(&self, name: &str) -> impl Future<Output = Result<Option<bool>, Self::Error>> + Send;

    /// Makes the request of this node for a block of a pool, or finds it; and whether it was made.
    fn request(&self, pool: &str) -> impl Future<Output = Result<(RequestView, bool), Self::Error>> + Send;

    /// A request, if it exists.
    fn poll(&self, name: &str) -> impl Future<Output = Result<Option<RequestView>, Self::Error>> + Send;

    /// Deletes a request, unless another has its name.
    fn forget(&self, name: &str, uid: &str) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Deletes a block, then removes the finalizer.
    fn release(&self, block: &BlockView) -> impl Future<Output = Result<Released, Self::Error>> + Send;

    /// Whether the object of this node exists.
    fn node_exists(&self) -> impl Future<Output = Result<bool, Self::Error>> + Send;
}

/// The Kubernetes API.
#[derive(Clone)]
pub struct KubeApi {
    node: String,
    blocks: Api<AddressBlock>,
    pools: Api<PartialObjectMeta<AddressPool>>,
    requests: Api<BlockRequest>,
    nodes: Api<PartialObjectMeta<Node>>,
}

impl KubeApi {
    /// For a node.
    #[must_use]
    pub fn new(client: Client, node: String) -> Self {
        Self {
            node,
            blocks: Api::all(client.clone()),
            pools: Api::all(client.clone()),
            requests: Api::all(client.clone()),
            nodes: Api::all(client),
        }
    }

    fn view(&self, block: &AddressBlock) -> Option<BlockView> {
        block_view(block).filter(|_| block.node() == Some(&self.node))
    }

    /// Waits for one call.
    async fn call<T>(
        &self,
        operation: &'static str,
        subject: &str,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ApiError> {
        let subject = || subject.to_owned();
        match tokio::time::timeout(TIMEOUT, call).await {
            Ok(result) => result.map_err(|source| ApiError::Call {
                operation,
                subject: subject(),
                source: Box::new(source),
            }),
            Err(_) => Err(ApiError::Silent { operation, subject: subject() }),
        }
    }

    async fn new_request(&self, pool: &str, name: &str) -> Result<BlockRequest, ApiError> {
        let node = self.call("get Node", &self.node, self.nodes.get(&self.node)).await?;
        let mut request = BlockRequest::new(
            name,
            BlockRequestSpec { node_name: self.node.clone(), pool_name: pool.to_owned() },
        );
        request.metadata = ObjectMeta {
            labels: Some([(names::LABEL_NODE.to_owned(), self.node.clone())].into()),
            // It goes with the node.
            owner_references: Some(vec![OwnerReference {
                api_version: Node::api_version(&()).into_owned(),
                kind: Node::kind(&()).into_owned(),
                name: self.node.clone(),
                uid: node.uid().unwrap_or_default(),
                ..OwnerReference::default()
            }]),
            ..request.metadata
        };
        Ok(request)
    }
}

impl BlockApi for KubeApi {
    type Error = ApiError;

    async fn blocks(&self) -> Result<Vec<BlockView>, ApiError> {
        let parameters = ListParams::default().labels(&format!("{}={}", names::LABEL_NODE, self.node));
        let list = self.call("list AddressBlocks of", &self.node, self.blocks.list(&parameters)).await?;
        Ok(list.items.iter().filter_map(|block| self.view(block)).collect())
    }

    async fn block(&self, name: &str) -> Result<Option<BlockView>, ApiError> {
        let block = self.call("get AddressBlock", name, self.blocks.get_opt(name)).await?;
        Ok(block.and_then(|block| self.view(&block)))
    }

    async fn pool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        let pool = self.call("get AddressPool", name, self.pools.get_opt(name)).await?;
        Ok(pool.map(|pool| pool.metadata.deletion_timestamp.is_some()))
    }

    async fn request(&self, pool: &str) -> Result<(RequestView, bool), ApiError> {
        const CREATE: &str = "create BlockRequest";
        let name = names::request_name(pool, &self.node);
        let request = self.new_request(pool, &name).await?;
        for _ in 0..ATTEMPTS {
            let parameters = PostParams::default();
            match self.call(CREATE, &name, self.requests.create(&parameters, &request)).await {
                Ok(created) => return Ok((request_view(&created), true)),
                Err(error) if error.code() == Some(409) => {}
                Err(error) => return Err(error),
            }
            let existing = self.call("get BlockRequest", &name, self.requests.get_opt(&name)).await?;
            match existing {
                // The name is made of two, so that another node may have it: "a-b" and "c", "a" and "b-c".
                Some(other) if other.spec != request.spec => break,
                Some(ours) if ours.metadata.deletion_timestamp.is_none() => {
                    return Ok((request_view(&ours), false));
                }
                _ => {}
            }
        }
        Err(ApiError::Busy { operation: CREATE, subject: name })
    }

    async fn poll(&self, name: &str) -> Result<Option<RequestView>, ApiError> {
        let request = self.call("get BlockRequest", name, self.requests.get_opt(name)).await?;
        Ok(request
            .filter(|request| request.spec.node_name == self.node)
            .map(|request| request_view(&request)))
    }

    async fn forget(&self, name: &str, uid: &str) -> Result<(), ApiError> {
        let preconditions = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() };
        match self.call("delete existing BlockRequest", name, self.requests.delete(name, &parameters)).await {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn release(&self, block: &BlockView) -> Result<Released, ApiError> {
        const DELETE: &str = "delete AddressBlock";
        let BlockView { name, uid, .. } = block;
        for _ in 0..ATTEMPTS {
            let get = self.blocks.get_opt(name);
            let Some(current) = self.call("get AddressBlock", name, get).await? else {
                return Ok(Released::Gone);
            };
            let Some(view) = self.view(&current).filter(|view| view.uid == *uid) else {
                // Another block by now, or another node's.
                return Ok(Released::Gone);
            };
            let result = if !view.deleted {
                if view.reserved {
                    return Ok(Released::Kept(view));
                }
                // An older request that is still on its way fails once the object has changed.
                let preconditions =
                    Preconditions { uid: Some(uid.clone()), resource_version: Some(view.version) };
                let parameters =
                    DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() };
                self.call(DELETE, name, self.blocks.delete(name, &parameters)).await.map(drop)
            } else if current.finalizers().iter().any(|finalizer| finalizer == names::FINALIZER) {
                let others: Vec<_> = current.finalizers().iter().filter(|f| *f != names::FINALIZER).collect();
                let patch = Patch::Merge(json!({ "metadata": {
                    "uid": uid, "resourceVersion": view.version, "finalizers": others,
                } }));
                let parameters = PatchParams::default();
                let patching = self.blocks.patch(name, &parameters, &patch);
                self.call("remove the finalizer of AddressBlock", name, patching).await.map(drop)
            } else {
                // Somebody else's finalizer holds it. It is ours no more, and nobody else's yet.
                return Err(ApiError::Busy { operation: DELETE, subject: name.clone() });
            };
            match result {
                Ok(()) => {}
                // Changed, or gone.
                Err(error) if matches!(error.code(), Some(404 | 409)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ApiError::Busy { operation: DELETE, subject: name.clone() })
    }

    async fn node_exists(&self) -> Result<bool, ApiError> {
        let node = self.call("get Node", &self.node, self.nodes.get_opt(&self.node)).await?;
        Ok(node.is_some())
    }
}

impl ApiError {
    /// HTTP code of the API server's answer.
    fn code(&self) -> Option<u16> {
        match self {
            Self::Call { source, .. } => match &**source {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::Silent { .. } | Self::Busy { .. } => None,
        }
    }
}

/// A block, if it can be used.
#[must_use]
pub fn block_view(block: &AddressBlock) -> Option<BlockView> {
    let name = block.name_any();
    let range = match block.nets() {
        Ok(nets) => Range::of(nets),
        Err(error) => {
            tracing::warn!(block = name, error = &error as &dyn Error, "the networks cannot be read");
            None
        }
    };
    Some(BlockView {
        uid: block.uid()?,
        version: block.resource_version().unwrap_or_default(),
        index: block.index,
        pool: block.pool()?.to_owned(),
        range: range?,
        reserved: block.is_reserved(),
        deleted: block.meta().deletion_timestamp.is_some(),
        name,
    })
}

/// A request.
#[must_use]
pub fn request_view(request: &BlockRequest) -> RequestView {
    RequestView {
        name: request.name_any(),
        uid: request.uid().unwrap_or_default(),
        pool: request.spec.pool_name.clone(),
        answer: match request.result() {
            Ok(block) => Answer::Block(block.to_owned()),
            Err(RequestError::InProgress) => Answer::Pending,
            Err(RequestError::Failed { reason }) if reason == REASON_OUT_OF_BLOCKS => Answer::Exhausted,
            Err(RequestError::Failed { reason }) => Answer::Refused(reason),
            Err(error @ RequestError::NoBlock) => Answer::Refused(error.to_string()),
        },
    }
}
