//! Scenarios of the original (`spec/coil.md` 8.5) as planning tests; those about its bindings and about
//! clients are with the reconcilers and in the agent.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;

use coil_api::egress::validate;
use coil_api::{Egress, conditions, names};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus};
use k8s_openapi::api::core::v1::{Container, EnvVar, PodSpec, PodTemplateSpec, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::egress::{Child, Observed, Outcome, Settings, Write, Written, plan, status};

const IMAGE: &str = "registry.example.org/coil:3";

fn settings() -> Settings {
    Settings { image: IMAGE.to_owned(), fou_port: 5555, drain_timeout: 300 }
}

fn egress(extra: Value) -> Egress {
    let mut spec = json!({ "destinations": ["0.0.0.0/0", "::/0"] });
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    let egress: Egress = serde_json::from_value(json!({
        "apiVersion": "coil.cybozu.com/v2", "kind": "Egress",
        "metadata": { "namespace": "internet", "name": "egress", "uid": "uid-1", "generation": 3 },
        "spec": spec,
    }))
    .unwrap();
    assert!(validate(&egress, None).is_empty(), "{:?}", validate(&egress, None));
    egress
}

/// A little API server: carries out writes, gives UIDs and generations.
#[derive(Default)]
struct World {
    observed: Observed,
    written: Written,
    settings: Option<Settings>,
}

impl World {
    fn reconcile(&mut self, egress: &Egress) -> Vec<Write> {
        let settings = self.settings.clone().unwrap_or_else(settings);
        let writes = plan(egress, &settings, &self.observed, &self.written).unwrap();
        for write in writes.clone() {
            match write {
                Write::Create { child, digest } => self.store(child, digest, None),
                Write::Replace { child, digest } => self.store(child, digest, Some(())),
                Write::DeleteBudget { .. } => self.observed.budget = None,
                Write::Refuse { .. } | Write::Await { .. } => {}
            }
        }
        writes
    }

    fn store(&mut self, child: Child, digest: u64, existing: Option<()>) {
        let bump = |metadata: &mut ObjectMeta, kind: &str| {
            if existing.is_none() {
                metadata.uid = Some(format!("uid-of-{kind}"));
            }
            metadata.generation = Some(metadata.generation.unwrap_or(0) + 1);
        };
        match child {
            Child::Deployment(mut d) => {
                bump(&mut d.metadata, "deployment");
                self.written.note(&d.metadata, digest);
                self.observed.deployment = Some(*d);
            }
            Child::Service(mut s) => {
                bump(&mut s.metadata, "service");
                // What the API server fills in.
                let spec = s.spec.as_mut().unwrap();
                spec.cluster_ip.get_or_insert_with(|| "10.96.0.7".to_owned());
                if spec.session_affinity.as_deref() == Some("ClientIP") {
                    spec.session_affinity_config
                        .get_or_insert_default()
                        .client_ip
                        .get_or_insert_default()
                        .timeout_seconds
                        .get_or_insert(10800);
                }
                self.observed.service = Some(*s);
            }
            Child::Budget(mut b) => {
                bump(&mut b.metadata, "budget");
                self.written.note(&b.metadata, digest);
                self.observed.budget = Some(*b);
            }
        }
    }

    fn deployment(&self) -> &Deployment {
        self.observed.deployment.as_ref().unwrap()
    }

    fn template(&self) -> &PodTemplateSpec {
        &self.deployment().spec.as_ref().unwrap().template
    }

    fn pod(&self) -> &PodSpec {
        self.template().spec.as_ref().unwrap()
    }

    fn container(&self) -> &Container {
        self.pod().containers.iter().find(|c| c.name == "egress").unwrap()
    }

    fn service(&self) -> &Service {
        self.observed.service.as_ref().unwrap()
    }

    fn budget(&self) -> &PodDisruptionBudget {
        self.observed.budget.as_ref().unwrap()
    }
}

fn reconciled(extra: Value) -> World {
    let mut world = World::default();
    world.reconcile(&egress(extra));
    world
}

fn now() -> Time {
    Time(Timestamp::from_second(1_800_000_000).unwrap())
}

#[test]
fn a59_deployment() {
    let world = reconciled(json!({ "replicas": 2 }));
    let deployment = world.deployment();
    assert_eq!(deployment.metadata.name.as_deref(), Some("egress"));
    assert_eq!(deployment.metadata.labels, Some(names::egress_labels("egress")));
    let owner = &deployment.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("Egress", "uid-1", Some(true)));
    let spec = deployment.spec.as_ref().unwrap();
    assert_eq!(spec.replicas, Some(2));
    assert_eq!(spec.selector.match_labels, Some(names::egress_labels("egress")));
    assert_eq!(spec.strategy, None);
    let metadata = world.template().metadata.as_ref().unwrap();
    assert_eq!(metadata.labels, Some(names::egress_labels("egress")));
    assert_eq!(metadata.annotations, None);

    let pod = world.pod();
    assert_eq!(pod.service_account_name.as_deref(), Some("coil-egress"));
    let volumes: Vec<_> = pod.volumes.iter().flatten().map(|v| v.name.as_str()).collect();
    assert_eq!(volumes, ["run", "bpffs"]);
    let sysctls = pod.security_context.as_ref().unwrap().sysctls.as_ref().unwrap();
    assert_eq!(
        (sysctls[0].name.as_str(), sysctls[0].value.as_str()),
        ("net.ipv4.ip_local_port_range", "64512 65535")
    );
    assert_eq!(pod.containers.len(), 1);
}

#[test]
fn a59_container() {
    let world = reconciled(json!({}));
    let container = world.container();
    assert_eq!(container.image.as_deref(), Some(IMAGE));
    assert_eq!(container.command.as_deref(), Some(["coil-egress".to_owned()].as_slice()));
    assert_eq!(container.args, None);
    let env: Vec<_> = container.env.iter().flatten().map(|e| (e.name.as_str(), source(e))).collect();
    assert_eq!(
        env,
        [
            ("COIL_POD_NAMESPACE", "internet"),
            ("COIL_EGRESS_NAME", "egress"),
            ("COIL_POD_ADDRESSES", "status.podIPs"),
            ("COIL_POD_UID", "metadata.uid"),
            ("COIL_DRAIN_TIMEOUT", "300"),
        ]
    );
    assert_eq!(world.pod().termination_grace_period_seconds, Some(310));
    let mounts: Vec<_> = container.volume_mounts.iter().flatten().map(|m| m.mount_path.as_str()).collect();
    assert_eq!(mounts, ["/run", "/sys/fs/bpf"]);
    let security = container.security_context.as_ref().unwrap();
    assert_eq!(security.privileged, Some(false));
    assert_eq!(security.read_only_root_filesystem, Some(true));
    let capabilities = security.capabilities.as_ref().unwrap();
    assert_eq!(capabilities.drop.as_deref(), Some(["ALL".to_owned()].as_slice()));
    assert!(capabilities.add.as_ref().unwrap().contains(&"NET_ADMIN".to_owned()));
    let requests = container.resources.as_ref().unwrap().requests.as_ref().unwrap();
    assert_eq!((requests["cpu"].0.as_str(), requests["memory"].0.as_str()), ("100m", "200Mi"));
    let ports: Vec<_> =
        container.ports.iter().flatten().map(|p| (p.name.as_deref().unwrap(), p.container_port)).collect();
    assert_eq!(ports, [("metrics", 8080), ("health", 8081)]);
    let path = |probe: &Option<k8s_openapi::api::core::v1::Probe>| {
        probe.as_ref().unwrap().http_get.as_ref().unwrap().path.clone().unwrap()
    };
    assert_eq!(path(&container.liveness_probe), "/healthz");
    assert_eq!(path(&container.readiness_probe), "/readyz");
}

fn source(variable: &EnvVar) -> &str {
    match (&variable.value, &variable.value_from) {
        (Some(value), None) => value,
        (None, Some(from)) => &from.field_ref.as_ref().unwrap().field_path,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a59_service() {
    let world = reconciled(json!({}));
    let service = world.service();
    assert_eq!(service.metadata.labels, Some(names::egress_labels("egress")));
    assert_eq!(service.metadata.owner_references.as_ref().unwrap()[0].uid, "uid-1");
    let spec = service.spec.as_ref().unwrap();
    assert_eq!(spec.selector, Some(names::egress_labels("egress")));
    assert_eq!(spec.type_.as_deref(), Some("ClusterIP"));
    assert_eq!(spec.session_affinity.as_deref(), Some("ClientIP"));
    assert_eq!(spec.ip_family_policy.as_deref(), Some("PreferDualStack"));
    let port = &spec.ports.as_ref().unwrap()[0];
    assert_eq!((port.port, port.protocol.as_deref()), (5555, Some("UDP")));
    assert_eq!(port.target_port, Some(IntOrString::Int(5555)));
    assert_eq!(port.name, None);
}

#[test]
fn a59_status() {
    let egress = egress(json!({ "replicas": 2 }));
    let mut world = World::default();
    world.reconcile(&egress);
    let status = status(&egress, &Outcome::Done, world.observed.deployment.as_ref(), now());
    assert_eq!(
        status.selector.as_deref(),
        Some(
            "app.kubernetes.io/component=egress,app.kubernetes.io/instance=egress,app.kubernetes.io/name=coil"
        )
    );
    assert_eq!(status.replicas, Some(0));
    assert_eq!(status.observed_generation, Some(3));
    assert!(conditions::is_true(&status.conditions, conditions::VALID));
    assert!(conditions::is_true(&status.conditions, conditions::RECONCILED));
    assert!(!conditions::is_true(&status.conditions, conditions::READY));
}

#[test]
fn nothing_is_written_twice() {
    let egress = egress(json!({
        "podDisruptionBudget": { "minAvailable": 1 },
        "template": { "spec": { "schedulerName": "mine" } },
    }));
    let mut world = World::default();
    assert_eq!(world.reconcile(&egress).len(), 3);
    assert_eq!(world.reconcile(&egress), []);
    // A controller that started anew cannot tell whether somebody changed what it wrote.
    world.written = Written::default();
    assert_eq!(world.reconcile(&egress).len(), 2);
    assert_eq!(world.reconcile(&egress), []);
}

#[test]
fn a60_strategy_and_template() {
    let mut world = reconciled(json!({ "strategy": { "type": "Recreate" } }));
    let strategy = |world: &World| world.deployment().spec.as_ref().unwrap().strategy.clone();
    assert_eq!(strategy(&world).unwrap().type_.as_deref(), Some("Recreate"));
    world.reconcile(&egress(json!({
        "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 5, "maxSurge": 3 } },
        "template": {
            "metadata": {
                "annotations": { "ann1": "foo" },
                "labels": { "label1": "bar", "app.kubernetes.io/name": "hoge" },
            },
            "spec": {
                "schedulerName": "hoge",
                "volumes": [{ "name": "dummy", "emptyDir": {} }],
                "containers": [{ "name": "sidecar", "image": "nginx" }],
            },
        },
    })));
    let rolling = strategy(&world).unwrap().rolling_update.unwrap();
    assert_eq!(rolling.max_unavailable, Some(IntOrString::Int(5)));
    assert_eq!(rolling.max_surge, Some(IntOrString::Int(3)));
    let metadata = world.template().metadata.as_ref().unwrap();
    let labels = metadata.labels.as_ref().unwrap();
    assert_eq!((labels["label1"].as_str(), labels["app.kubernetes.io/name"].as_str()), ("bar", "coil"));
    assert_eq!(metadata.annotations.as_ref().unwrap()["ann1"], "foo");
    assert_eq!(world.pod().scheduler_name.as_deref(), Some("hoge"));
    let containers: Vec<_> = world.pod().containers.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(containers, ["egress", "sidecar"]);
    let volumes: Vec<_> = world.pod().volumes.iter().flatten().map(|v| v.name.as_str()).collect();
    assert_eq!(volumes, ["dummy", "run", "bpffs"]);

    // The original keeps the strategy for ever.
    world.reconcile(&egress(json!({})));
    assert_eq!(strategy(&world), None);
}

#[test]
fn a61_container_of_the_user() {
    let mut world = reconciled(json!({ "template": {
        "metadata": { "labels": { "label1": "bar" } },
        "spec": { "schedulerName": "hoge" },
    }}));
    world.reconcile(&egress(json!({ "template": { "spec": { "containers": [{
        "name": "egress",
        "image": "mycoil:0",
        "args": ["--fou-port=1"],
        "env": [{ "name": "COIL_EGRESS_NAME", "value": "forged" }, { "name": "MINE", "value": "1" }],
        "resources": { "limits": { "cpu": "1000m" }, "requests": { "cpu": "1000m" } },
        "securityContext": { "privileged": true },
    }] } } })));
    let container = world.container();
    assert_eq!(container.image.as_deref(), Some("mycoil:0"));
    assert_eq!(container.args.as_deref(), Some(["--fou-port=1".to_owned()].as_slice()));
    let resources = container.resources.as_ref().unwrap();
    assert_eq!(resources.limits.as_ref().unwrap()["cpu"].0, "1000m");
    let requests = resources.requests.as_ref().unwrap();
    assert_eq!((requests["cpu"].0.as_str(), requests["memory"].0.as_str()), ("1000m", "200Mi"));
    assert_eq!(container.security_context.as_ref().unwrap().privileged, Some(false));
    let env: Vec<_> = container.env.iter().flatten().map(|e| (e.name.as_str(), source(e))).collect();
    assert!(env.contains(&("COIL_EGRESS_NAME", "egress")) && env.contains(&("MINE", "1")), "{env:?}");
    assert!(!env.contains(&("COIL_EGRESS_NAME", "forged")));
    assert!(!world.template().metadata.as_ref().unwrap().labels.as_ref().unwrap().contains_key("label1"));
    assert_eq!(world.pod().scheduler_name, None);
}

#[test]
fn the_drain_fits_into_what_the_pod_is_given_to_end() {
    let of = |spec: Value| {
        let world = reconciled(json!({ "template": { "spec": spec } }));
        let env: BTreeMap<_, _> =
            world.container().env.iter().flatten().map(|e| (e.name.clone(), source(e).to_owned())).collect();
        (world.pod().termination_grace_period_seconds, env["COIL_DRAIN_TIMEOUT"].clone())
    };
    assert_eq!(of(json!({})), (Some(310), "300".into()));
    assert_eq!(of(json!({ "terminationGracePeriodSeconds": 3600 })), (Some(3600), "3590".into()));
    assert_eq!(of(json!({ "terminationGracePeriodSeconds": 5 })), (Some(5), "0".into()));
    let own = json!({ "containers": [{ "name": "egress", "env": [{ "name": "COIL_DRAIN_TIMEOUT", "value": "7" }] }] });
    assert_eq!(of(own), (Some(310), "7".into()));
}

#[test]
fn a62_affinity() {
    let timeout = |world: &World| {
        let spec = world.service().spec.as_ref().unwrap();
        let config = spec.session_affinity_config.as_ref();
        let seconds = config.and_then(|c| c.client_ip.as_ref()).and_then(|c| c.timeout_seconds);
        (spec.session_affinity.clone().unwrap(), seconds)
    };
    let mut world = reconciled(json!({}));
    assert_eq!(timeout(&world), ("ClientIP".to_owned(), Some(10800)));
    let none = egress(json!({
        "sessionAffinity": "None",
        "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 100 } },
    }));
    world.reconcile(&none);
    assert_eq!(timeout(&world), ("None".to_owned(), None));
    assert_eq!(world.reconcile(&none), []);
    world.reconcile(&egress(json!({ "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 100 } } })));
    assert_eq!(timeout(&world), ("ClientIP".to_owned(), Some(100)));
    // The original keeps the timeout.
    world.reconcile(&egress(json!({})));
    assert_eq!(timeout(&world), ("ClientIP".to_owned(), Some(10800)));
    assert_eq!(world.service().spec.as_ref().unwrap().cluster_ip.as_deref(), Some("10.96.0.7"));
}

#[test]
fn a63_deleted_children_are_made_again() {
    let egress = egress(json!({ "podDisruptionBudget": { "maxUnavailable": 1 } }));
    let mut world = World::default();
    world.reconcile(&egress);
    world.observed = Observed::default();
    let writes = world.reconcile(&egress);
    assert!(matches!(
        writes[..],
        [
            Write::Create { child: Child::Deployment(_), .. },
            Write::Create { child: Child::Service(_), .. },
            Write::Create { child: Child::Budget(_), .. }
        ]
    ));
    // One that is on its way out is left to go.
    world.observed.service.as_mut().unwrap().metadata.deletion_timestamp = Some(now());
    assert_eq!(world.reconcile(&egress), []);
}

#[test]
fn a65_changes_by_others() {
    let egress = egress(json!({}));
    let mut world = World::default();
    world.reconcile(&egress);
    // `kubectl rollout restart`, and somebody who adds a label.
    let deployment = world.observed.deployment.as_mut().unwrap();
    deployment.metadata.generation = Some(17);
    let metadata = deployment.spec.as_mut().unwrap().template.metadata.as_mut().unwrap();
    metadata
        .annotations
        .get_or_insert_default()
        .insert("kubectl.kubernetes.io/restartedAt".into(), "now".into());
    metadata.labels.as_mut().unwrap().insert("foreign".into(), "label".into());
    assert_eq!(world.reconcile(&egress).len(), 1);
    let metadata = world.template().metadata.as_ref().unwrap();
    assert_eq!(metadata.annotations.as_ref().unwrap()["kubectl.kubernetes.io/restartedAt"], "now");
    assert!(!metadata.labels.as_ref().unwrap().contains_key("foreign"));
    assert_eq!(world.reconcile(&egress), []);
    // Labels of the object itself are not part of any generation.
    world
        .observed
        .service
        .as_mut()
        .unwrap()
        .metadata
        .labels
        .as_mut()
        .unwrap()
        .remove("app.kubernetes.io/name");
    assert_eq!(world.reconcile(&egress).len(), 1);
    assert_eq!(world.service().metadata.labels, Some(names::egress_labels("egress")));
}

#[test]
fn a66_budget_comes_changes_and_goes() {
    let mut world = reconciled(json!({ "podDisruptionBudget": { "minAvailable": 1 } }));
    let spec = world.budget().spec.clone().unwrap();
    assert_eq!(spec.min_available, Some(IntOrString::Int(1)));
    assert_eq!(spec.selector.unwrap().match_labels, Some(names::egress_labels("egress")));
    // The original leaves both fields set, which the API server refuses.
    world.reconcile(&egress(json!({ "podDisruptionBudget": { "maxUnavailable": "50%" } })));
    let spec = world.budget().spec.clone().unwrap();
    assert_eq!((spec.min_available, spec.max_unavailable), (None, Some(IntOrString::String("50%".into()))));
    // The original leaves the budget.
    let writes = world.reconcile(&egress(json!({})));
    assert!(matches!(writes[..], [Write::DeleteBudget { .. }]));
    assert!(world.observed.budget.is_none());
    // One that a user made is not ours to remove.
    world.observed.budget = Some(PodDisruptionBudget {
        metadata: ObjectMeta { name: Some("egress".into()), uid: Some("x".into()), ..ObjectMeta::default() },
        ..PodDisruptionBudget::default()
    });
    assert_eq!(world.reconcile(&egress(json!({}))), []);
}

#[test]
fn a67_arguments() {
    // There is no backend to choose, so nothing of `--backend` reaches the pods.
    let mut world = World { settings: Some(Settings { fou_port: 6666, ..settings() }), ..World::default() };
    world.reconcile(&egress(json!({ "fouSourcePortAuto": true })));
    let arguments: Vec<_> = world.container().args.iter().flatten().map(String::as_str).collect();
    assert_eq!(arguments, ["--enable-sport-auto=true", "--fou-port=6666"]);
    assert_eq!(world.service().spec.as_ref().unwrap().ports.as_ref().unwrap()[0].port, 6666);
}

#[test]
fn what_belongs_to_others_is_not_touched() {
    let egress = egress(json!({}));
    let mut world = World::default();
    world.reconcile(&egress);
    let owner = |uid: &str| OwnerReference {
        controller: Some(true),
        uid: uid.into(),
        kind: "Other".into(),
        name: "egress".into(),
        ..OwnerReference::default()
    };
    let service = world.observed.service.as_mut().unwrap();
    service.metadata.owner_references = Some(vec![owner("somebody")]);
    let writes = world.reconcile(&egress);
    assert!(matches!(&writes[..], [Write::Refuse { kind: "Service", name }] if name == "egress"));
    // Left by an Egress of the same name.
    let service = world.observed.service.as_mut().unwrap();
    service.metadata.owner_references.as_mut().unwrap()[0].kind = "Egress".into();
    assert!(matches!(world.reconcile(&egress)[..], [Write::Await { kind: "Service", .. }]));
    // Restored from a backup: nobody's, but marked as ours.
    let service = world.observed.service.as_mut().unwrap();
    service.metadata.owner_references = None;
    assert_eq!(world.reconcile(&egress).len(), 1);
    assert_eq!(world.service().metadata.owner_references.as_ref().unwrap()[0].uid, "uid-1");
    // A user's, by chance of the same name.
    let deployment = world.observed.deployment.as_mut().unwrap();
    deployment.metadata.owner_references = None;
    deployment.metadata.labels = None;
    assert!(matches!(world.reconcile(&egress)[..], [Write::Refuse { kind: "Deployment", .. }]));
}

fn with_status(available: i32, failure: Option<&str>) -> Deployment {
    let conditions = failure.map(|message| {
        vec![DeploymentCondition {
            type_: "ReplicaFailure".into(),
            status: "True".into(),
            message: Some(message.into()),
            ..DeploymentCondition::default()
        }]
    });
    Deployment {
        status: Some(DeploymentStatus {
            available_replicas: Some(available),
            conditions,
            ..DeploymentStatus::default()
        }),
        ..Deployment::default()
    }
}

#[test]
fn readiness_follows_the_deployment() {
    let egress = egress(json!({ "replicas": 2 }));
    for (available, failure, want, reason) in [
        (0, None, "False", "NoReplicaAvailable"),
        (1, None, "True", "SomeReplicasAvailable"),
        (2, None, "True", "AllReplicasAvailable"),
        (0, Some("quota exceeded"), "False", "NoReplicaAvailable"),
    ] {
        let status = status(&egress, &Outcome::Done, Some(&with_status(available, failure)), now());
        let ready = status.conditions.iter().find(|c| c.type_ == "Ready").unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), (want, reason));
        assert!(ready.message.contains(failure.unwrap_or_default()));
        assert_eq!(status.replicas, Some(available));
    }
}

#[test]
fn an_invalid_specification_is_a_condition() {
    let mut egress = egress(json!({}));
    egress.spec.destinations = vec!["10.0.0.0".into()];
    let violations = validate(&egress, None);
    let status = status(&egress, &Outcome::Invalid(violations), Some(&with_status(1, None)), now());
    let find = |kind: &str| status.conditions.iter().find(|c| c.type_ == kind).unwrap();
    assert_eq!(find("Valid").status, "False");
    assert!(find("Valid").message.contains("spec.destinations[0]"), "{}", find("Valid").message);
    assert_eq!(find("Reconciled").status, "False");
    // What runs still runs.
    assert_eq!(find("Ready").status, "True");
}
