//! Events on pods, so that `kubectl describe` tells why something waits.

use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Error};
use serde_json::json;
use std::collections::HashMap;
use tracing::debug;

/// Something that has happened to a pod.
#[derive(Clone, Debug)]
pub(super) struct News {
    warning: bool,
    reason: &'static str,
    message: String,
}

impl News {
    /// Something worth a warning.
    pub(super) fn warning(reason: &'static str, message: String) -> Self {
        Self { warning: true, reason, message }
    }

    /// Something normal.
    pub(super) fn normal(reason: &'static str, message: String) -> Self {
        Self { warning: false, reason, message }
    }
}

/// Records the events of one pod. The same event again only raises its count.
pub(super) struct Events {
    client: Client,
    node: String,
    told: HashMap<(String, String), (String, u32)>,
}

impl Events {
    pub(super) fn new(client: Client, node: &str) -> Self {
        Self { client, node: node.to_owned(), told: HashMap::new() }
    }

    /// Records what has happened.
    pub(super) async fn tell(&mut self, pod: &Pod, news: News) {
        let kind = if news.warning { "Warning" } else { "Normal" };
        // Events are a courtesy: a pod never waits or fails for want of one.
        if let Err(error) = self.try_tell(pod, kind, news.reason, &news.message).await {
            debug!(%error, news.reason, "event not recorded");
        }
    }

    async fn try_tell(&mut self, pod: &Pod, kind: &str, reason: &str, message: &str) -> Result<(), Error> {
        let metadata = &pod.metadata;
        let namespace = metadata.namespace.clone().unwrap_or_default();
        let pod_name = metadata.name.clone().unwrap_or_default();
        let events: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let key = (reason.to_owned(), message.to_owned());
        if let Some((name, count)) = self.told.get_mut(&key) {
            *count += 1;
            let patch = json!({ "count": *count, "lastTimestamp": now });
            events.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
            return Ok(());
        }
        let suffix = uuid::Uuid::new_v4().simple().to_string();
        let name = format!("{pod_name}.{}", &suffix[..16]);
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": name, "namespace": namespace },
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": namespace,
                "name": pod_name,
                "uid": metadata.uid,
                "resourceVersion": metadata.resource_version,
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": { "component": "kubelet", "host": self.node },
            "reportingComponent": "kubelet",
            "reportingInstance": self.node,
        });
        let event: Event = serde_json::from_value(event).map_err(Error::SerdeError)?;
        events.create(&PostParams::default(), &event).await?;
        self.told.insert(key, (name, 1));
        Ok(())
    }
}
