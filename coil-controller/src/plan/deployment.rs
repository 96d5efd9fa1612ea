//! The Deployment of an Egress: the user's template with Coil's container in it.
//!
//! The original runs the container privileged. Ours loads and attaches TC programs and writes pins, for
//! which `BPF`, `PERFMON` (the verifier treats programs without it as hostile) and `NET_ADMIN` are enough
//! on all supported kernels; everything else is dropped. The container runtime's default AppArmor and
//! SELinux profiles forbid writing below `/sys/fs`, whatever the capabilities, so they are lifted. Local
//! ports of the pod's own connections are kept apart from those that NAT uses by a pod-level sysctl, one
//! of those that Kubernetes counts as safe; inside the container `/proc/sys` is read-only.

use std::collections::BTreeMap;

use coil_api::egress::EgressPodTemplate;
use coil_api::{Egress, names};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec};
use k8s_openapi::api::core::v1::{
    AppArmorProfile, Capabilities, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource,
    HTTPGetAction, HostPathVolumeSource, ObjectFieldSelector, PodSecurityContext, PodSpec, PodTemplateSpec,
    Probe, SELinuxOptions, SecurityContext, Sysctl, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::egress::{DEFAULT_FOU_PORT, Settings};
use super::ownership::claim;

/// Ports of the pod's own connections: those that NAT does not use.
const LOCAL_PORTS: (&str, &str) = ("net.ipv4.ip_local_port_range", "64512 65535");
/// Seconds after the end of a drain in which the process ends and is not killed.
const AFTER_DRAIN: i64 = 10;
const BPFFS: &str = "/sys/fs/bpf";
const VOLUME_BPFFS: &str = "bpffs";
const DRAIN_TIMEOUT: &str = "COIL_DRAIN_TIMEOUT";
const VOLUME_RUN: &str = "run";

/// The Deployment as it should be.
pub(super) fn deployment(
    egress: &Egress,
    settings: &Settings,
    observed: Option<&Deployment>,
) -> Result<Deployment, serde_json::Error> {
    let labels = names::egress_labels(&egress.name_any());
    let old = observed.and_then(|d| d.spec.clone());
    let kept = old
        .as_ref()
        .and_then(|s| s.template.metadata.as_ref())
        .and_then(|m| m.annotations.clone())
        .unwrap_or_default();
    let mut spec = old.unwrap_or_else(|| DeploymentSpec {
        // Immutable, so set only here.
        selector: LabelSelector { match_labels: Some(labels.clone()), match_expressions: None },
        ..DeploymentSpec::default()
    });
    spec.replicas = Some(egress.spec.replicas);
    spec.strategy = egress.spec.strategy.clone();
    spec.template = pod_template(egress, settings, labels, kept)?;
    Ok(Deployment {
        metadata: claim(egress, observed.map(|d| &d.metadata)),
        spec: Some(spec),
        status: observed.and_then(|d| d.status.clone()),
    })
}

/// What identifies the wanted specification; equal digests mean that nothing of ours changed.
pub(super) fn statement(deployment: &Deployment) -> serde_json::Value {
    let spec = deployment.spec.as_ref();
    serde_json::json!({
        "replicas": spec.and_then(|s| s.replicas),
        "strategy": spec.and_then(|s| s.strategy.as_ref()),
        "template": spec.map(|s| &s.template),
    })
}

/// Labels are the template's and ours. Annotations that others added stay, so that
/// `kubectl rollout restart` works.
fn pod_template(
    egress: &Egress,
    settings: &Settings,
    ours: BTreeMap<String, String>,
    kept_annotations: BTreeMap<String, String>,
) -> Result<PodTemplateSpec, serde_json::Error> {
    let template = egress.spec.template.clone().unwrap_or_default();
    let EgressPodTemplate { metadata, spec } = template;
    let metadata = metadata.unwrap_or_default();
    let mut labels = metadata.labels;
    labels.extend(ours);
    let mut annotations = kept_annotations;
    annotations.extend(metadata.annotations);
    let mut pod = spec.map(|raw| raw.parse()).transpose()?.unwrap_or_default();
    fill(&mut pod, egress, settings);
    Ok(PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(pod),
    })
}

fn fill(pod: &mut PodSpec, egress: &Egress, settings: &Settings) {
    pod.service_account_name = Some(names::EGRESS_SERVICE_ACCOUNT.to_owned());
    pod.service_account = None;
    // Variables of Services could be taken for ours.
    pod.enable_service_links.get_or_insert(false);
    let drain = i64::from(settings.drain_timeout);
    let grace = *pod.termination_grace_period_seconds.get_or_insert(drain + AFTER_DRAIN);
    let volumes = pod.volumes.get_or_insert_default();
    if !volumes.iter().any(|v| v.name == VOLUME_RUN) {
        volumes.push(Volume {
            name: VOLUME_RUN.to_owned(),
            empty_dir: Some(EmptyDirVolumeSource::default()),
            ..Volume::default()
        });
    }
    volumes.retain(|v| v.name != VOLUME_BPFFS);
    volumes.push(Volume {
        name: VOLUME_BPFFS.to_owned(),
        host_path: Some(HostPathVolumeSource {
            path: BPFFS.to_owned(),
            type_: Some("DirectoryOrCreate".to_owned()),
        }),
        ..Volume::default()
    });
    let security: &mut PodSecurityContext = pod.security_context.get_or_insert_default();
    let sysctls = security.sysctls.get_or_insert_default();
    sysctls.retain(|s| s.name != LOCAL_PORTS.0);
    sysctls.push(Sysctl { name: LOCAL_PORTS.0.to_owned(), value: LOCAL_PORTS.1.to_owned() });

    let position =
        pod.containers.iter().position(|c| c.name == names::EGRESS_CONTAINER).unwrap_or_else(|| {
            pod.containers
                .insert(0, Container { name: names::EGRESS_CONTAINER.to_owned(), ..Container::default() });
            0
        });
    if let Some(container) = pod.containers.get_mut(position) {
        fill_container(container, egress, settings);
        drain_timeout(container, grace);
    }
}

/// The drain fits into what the pod is given to end; a variable that the template sets itself stays.
fn drain_timeout(container: &mut Container, grace: i64) {
    let env = container.env.get_or_insert_default();
    if !env.iter().any(|variable| variable.name == DRAIN_TIMEOUT) {
        env.push(EnvVar {
            name: DRAIN_TIMEOUT.to_owned(),
            value: Some((grace - AFTER_DRAIN).max(0).to_string()),
            value_from: None,
        });
    }
}

fn fill_container(container: &mut Container, egress: &Egress, settings: &Settings) {
    if container.image.as_ref().is_none_or(String::is_empty) {
        container.image = Some(settings.image.clone());
    }
    if container.command.as_ref().is_none_or(Vec::is_empty) {
        container.command = Some(vec!["coil-egress".to_owned()]);
    }
    if container.args.as_ref().is_none_or(Vec::is_empty) {
        container.args = Some(arguments(egress, settings)).filter(|args| !args.is_empty());
    }
    environment(container, egress);
    let mounts = container.volume_mounts.get_or_insert_default();
    if !mounts.iter().any(|m| m.name == VOLUME_RUN) {
        mounts.push(VolumeMount {
            name: VOLUME_RUN.to_owned(),
            mount_path: "/run".to_owned(),
            ..VolumeMount::default()
        });
    }
    mounts.retain(|m| m.name != VOLUME_BPFFS);
    mounts.push(VolumeMount {
        name: VOLUME_BPFFS.to_owned(),
        mount_path: BPFFS.to_owned(),
        // A file system that the host mounts there later is seen.
        mount_propagation: Some("HostToContainer".to_owned()),
        ..VolumeMount::default()
    });
    container.security_context = Some(security_context());
    let requests = container.resources.get_or_insert_default().requests.get_or_insert_default();
    for (name, amount) in [("cpu", "100m"), ("memory", "200Mi")] {
        requests.entry(name.to_owned()).or_insert_with(|| Quantity(amount.to_owned()));
    }
    container.ports = Some(vec![port("metrics", 8080), port("health", 8081)]);
    container.liveness_probe = Some(probe("/healthz"));
    container.readiness_probe = Some(probe("/readyz"));
}

/// Only when the user gave none.
fn arguments(egress: &Egress, settings: &Settings) -> Vec<String> {
    let mut arguments = Vec::new();
    if egress.spec.fou_source_port_auto {
        arguments.push("--enable-sport-auto=true".to_owned());
    }
    if settings.fou_port != DEFAULT_FOU_PORT {
        arguments.push(format!("--fou-port={}", settings.fou_port));
    }
    arguments
}

fn environment(container: &mut Container, egress: &Egress) {
    let value =
        |name: &str, value: String| EnvVar { name: name.to_owned(), value: Some(value), value_from: None };
    let field = |name: &str, path: &str| EnvVar {
        name: name.to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { api_version: None, field_path: path.to_owned() }),
            ..EnvVarSource::default()
        }),
    };
    let ours = [
        value("COIL_POD_NAMESPACE", egress.namespace().unwrap_or_default()),
        value("COIL_EGRESS_NAME", egress.name_any()),
        field("COIL_POD_ADDRESSES", "status.podIPs"),
        field("COIL_POD_UID", "metadata.uid"),
    ];
    let env = container.env.get_or_insert_default();
    env.retain(|e| ours.iter().all(|o| o.name != e.name));
    env.extend(ours);
}

fn security_context() -> SecurityContext {
    SecurityContext {
        privileged: Some(false),
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        run_as_user: Some(0),
        run_as_non_root: Some(false),
        capabilities: Some(Capabilities {
            add: Some(["BPF", "NET_ADMIN", "PERFMON"].map(str::to_owned).to_vec()),
            drop: Some(vec!["ALL".to_owned()]),
        }),
        app_armor_profile: Some(AppArmorProfile { type_: "Unconfined".to_owned(), localhost_profile: None }),
        se_linux_options: Some(SELinuxOptions {
            type_: Some("spc_t".to_owned()),
            ..SELinuxOptions::default()
        }),
        ..SecurityContext::default()
    }
}

fn port(name: &str, number: i32) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

fn probe(path: &str) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("health".to_owned()),
            scheme: Some("HTTP".to_owned()),
            ..HTTPGetAction::default()
        }),
        ..Probe::default()
    }
}
