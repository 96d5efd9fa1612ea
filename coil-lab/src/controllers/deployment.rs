//! Deployment: one ReplicaSet per template, rolled over as the strategy says.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Cluster, each, is_controlled_by, names, number_or_percent, owner_reference, set_condition};
use crate::api::delete::DeleteOptions;
use crate::api::write::Part;
use crate::api::{ApiResult, obj};

const REVISION: &str = "deployment.kubernetes.io/revision";
const HASH: &str = "pod-template-hash";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

pub(super) fn pass(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let sets = cluster.list("apps", "replicasets")?;
    let pods = cluster.list("", "pods")?;
    let resource = cluster.resource("apps", "replicasets")?;
    let mut again = None;
    each(cluster.list("apps", "deployments")?, |deployment| {
        let owned = cluster.claim(&resource, &deployment, &sets)?;
        if sync(cluster, &deployment, owned, &pods)? {
            again = Some(Duration::from_secs(1));
        }
        Ok(())
    })?;
    Ok(again)
}

/// The rollout numbers of one ReplicaSet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SetNumbers {
    /// Wished replicas.
    pub wished: i64,
    /// Available replicas.
    pub available: i64,
}

/// The rollout numbers of a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Goal {
    /// Wished replicas.
    pub replicas: i64,
    /// How many more may exist meanwhile.
    pub surge: i64,
    /// How many may be missing meanwhile.
    pub unavailable: i64,
}

/// The next sizes in a rolling update: of the new set and of the old ones (in the given order).
pub(super) fn roll(goal: Goal, new: SetNumbers, old: &[SetNumbers]) -> (i64, Vec<i64>) {
    let old_total: i64 = old.iter().map(|one| one.wished).sum();
    let room = goal.replicas + goal.surge - old_total - new.wished;
    let new_size = if new.wished >= goal.replicas {
        goal.replicas
    } else {
        new.wished + room.clamp(0, goal.replicas - new.wished)
    };
    let mut sizes: Vec<i64> = old.iter().map(|one| one.wished).collect();
    let min_available = goal.replicas - goal.unavailable;
    let new_missing = (new.wished - new.available).max(0);
    // First what does not work anyway, then what works, never below the minimum that must be available.
    let mut may_go = old_total + new.wished - min_available - new_missing;
    for (size, one) in sizes.iter_mut().zip(old) {
        let broken = (one.wished - one.available).clamp(0, may_go.max(0));
        *size -= broken;
        may_go -= broken;
    }
    let available: i64 = new.available + old.iter().map(|one| one.available).sum::<i64>();
    let mut may_go = (available - min_available).min(may_go.max(0));
    for size in &mut sizes {
        let gone = (*size).clamp(0, may_go.max(0));
        *size -= gone;
        may_go -= gone;
    }
    (new_size, sizes)
}

fn numbers(set: &Value) -> SetNumbers {
    SetNumbers {
        wished: obj::int(set, &["spec", "replicas"]).unwrap_or(0),
        available: obj::int(set, &["status", "availableReplicas"]).unwrap_or(0),
    }
}

fn goal_of(deployment: &Value) -> Goal {
    let replicas = obj::int(deployment, &["spec", "replicas"]).unwrap_or(1);
    let rolling = |field: &str| obj::at(deployment, &["spec", "strategy", "rollingUpdate", field]);
    let surge = number_or_percent(rolling("maxSurge"), replicas, true);
    let mut unavailable = number_or_percent(rolling("maxUnavailable"), replicas, false).min(replicas);
    if surge == 0 && unavailable == 0 {
        unavailable = 1;
    }
    Goal { replicas, surge, unavailable }
}

fn revision(object: &Value) -> i64 {
    obj::annotation(object, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn template_of(set: &Value) -> Value {
    let mut template = obj::at(set, &["spec", "template"]).cloned().unwrap_or_default();
    obj::remove(&mut template, &["metadata", "labels", HASH]);
    template
}

/// One step of one deployment. True when a rollout is under way.
fn sync(
    cluster: &Cluster,
    deployment: &Value,
    mut sets: Vec<Arc<Value>>,
    pods: &[Arc<Value>],
) -> ApiResult<bool> {
    if obj::is_deleting(deployment) {
        return Ok(false);
    }
    let wanted = template_of(deployment);
    sets.sort_by_key(|set| revision(set));
    let current = sets.iter().position(|set| template_of(set) == wanted);
    let current = current.map(|index| sets.remove(index));
    let newest = sets.last().map_or(0, |set| revision(set));
    let is_paused = obj::flag(deployment, &["spec", "paused"]);
    let is_recreate = obj::text(deployment, &["spec", "strategy", "type"]) == "Recreate";
    let goal = goal_of(deployment);

    let resource = cluster.resource("apps", "replicasets")?;
    if is_paused {
        if let Some(current) = current.as_ref().filter(|_| sets.iter().all(|set| numbers(set).wished == 0)) {
            resize(cluster, deployment, current, goal.replicas)?;
        }
    } else if is_recreate {
        for set in sets.iter().filter(|set| numbers(set).wished > 0) {
            resize(cluster, deployment, set, 0)?;
        }
        let is_old_pod_left = pods
            .iter()
            .any(|pod| sets.iter().any(|set| is_controlled_by(pod, set)) && !super::pods::is_finished(pod));
        if !is_old_pod_left {
            let set = ensure_current(cluster, deployment, current.as_ref(), newest, goal.replicas)?;
            resize(cluster, deployment, &set, goal.replicas)?;
        }
    } else {
        let old: Vec<SetNumbers> = sets.iter().map(|set| numbers(set)).collect();
        let zero = SetNumbers { wished: 0, available: 0 };
        let (first, _) = roll(goal, zero, &old);
        let set = ensure_current(cluster, deployment, current.as_ref(), newest, first)?;
        let (size, sizes) = roll(goal, numbers(&set), &old);
        resize(cluster, deployment, &set, size)?;
        for (set, size) in sets.iter().zip(sizes) {
            resize(cluster, deployment, set, size)?;
        }
    }
    let limit = obj::int(deployment, &["spec", "revisionHistoryLimit"]).unwrap_or(10);
    let idle: Vec<&Arc<Value>> = sets
        .iter()
        .filter(|set| numbers(set).wished == 0 && obj::int(set, &["status", "replicas"]).unwrap_or(0) == 0)
        .collect();
    let surplus = idle.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    for set in idle.into_iter().take(surplus) {
        cluster.delete(&resource, set, DeleteOptions::default())?;
    }
    write_status(cluster, deployment, current.as_deref(), &sets, goal)
}

fn ensure_current(
    cluster: &Cluster,
    deployment: &Value,
    current: Option<&Arc<Value>>,
    newest_old: i64,
    size: i64,
) -> ApiResult<Arc<Value>> {
    let resource = cluster.resource("apps", "replicasets")?;
    let next = match current {
        Some(set) if revision(set) > newest_old => revision(set),
        _ => newest_old + 1,
    };
    let set = match current {
        Some(set) if revision(set) == next => set.clone(),
        Some(set) => {
            let patch = json!({"metadata": {"annotations": {REVISION: next.to_string()}}});
            cluster.merge(&resource, set, Part::Main, patch)?;
            set.clone()
        }
        None => create_set(cluster, deployment, next, size)?,
    };
    if revision(deployment) != next {
        let deployments = cluster.resource("apps", "deployments")?;
        let patch = json!({"metadata": {"annotations": {REVISION: next.to_string()}}});
        cluster.merge(&deployments, deployment, Part::Main, patch)?;
    }
    Ok(set)
}

fn create_set(cluster: &Cluster, deployment: &Value, revision: i64, size: i64) -> ApiResult<Arc<Value>> {
    let mut template = template_of(deployment);
    let hash = names::hash(&template);
    obj::set(&mut template, &["metadata", "labels", HASH], hash.clone());
    let mut selector = obj::at(deployment, &["spec", "selector"]).cloned().unwrap_or_default();
    obj::set(&mut selector, &["matchLabels", HASH], hash.clone());
    let mut annotations = obj::at(deployment, &["metadata", "annotations"]).cloned().unwrap_or(json!({}));
    obj::remove(&mut annotations, &[LAST_APPLIED]);
    obj::set(&mut annotations, &[REVISION], revision.to_string());
    let name = format!("{}-{hash}", obj::name(deployment));
    let mut spec = json!({"replicas": size, "selector": selector, "template": template});
    if let Some(seconds) = obj::int(deployment, &["spec", "minReadySeconds"]) {
        obj::set(&mut spec, &["minReadySeconds"], seconds);
    }
    let set = json!({
        "metadata": {
            "name": name, "labels": obj::at(&template, &["metadata", "labels"]), "annotations": annotations,
            "ownerReferences": [owner_reference(deployment)],
        },
        "spec": spec,
    });
    let set = cluster.create("apps", "replicasets", Some(obj::namespace(deployment)), set)?;
    let message = format!("Scaled up replica set {name} from 0 to {size}");
    cluster.event(deployment, "Normal", "ScalingReplicaSet", &message);
    Ok(set)
}

fn resize(cluster: &Cluster, deployment: &Value, set: &Value, size: i64) -> ApiResult<()> {
    let before = numbers(set).wished;
    if before == size {
        return Ok(());
    }
    let resource = cluster.resource("apps", "replicasets")?;
    cluster.merge(&resource, set, Part::Main, json!({"spec": {"replicas": size}}))?;
    let direction = if size > before { "up" } else { "down" };
    let message = format!("Scaled {direction} replica set {} from {before} to {size}", obj::name(set));
    cluster.event(deployment, "Normal", "ScalingReplicaSet", &message);
    Ok(())
}

fn write_status(
    cluster: &Cluster,
    deployment: &Value,
    current: Option<&Value>,
    old: &[Arc<Value>],
    goal: Goal,
) -> ApiResult<bool> {
    let count = |set: &Value, field: &str| obj::int(set, &["status", field]).unwrap_or(0);
    let all = || current.into_iter().chain(old.iter().map(|set| &**set));
    let sum = |field: &str| all().map(|set| count(set, field)).sum::<i64>();
    let (replicas, available) = (sum("replicas"), sum("availableReplicas"));
    let updated = current.map_or(0, |set| count(set, "replicas"));
    let mut status = json!({
        "observedGeneration": obj::int(deployment, &["metadata", "generation"]).unwrap_or(1),
    });
    for (field, number) in [
        ("replicas", replicas),
        ("updatedReplicas", updated),
        ("readyReplicas", sum("readyReplicas")),
        ("availableReplicas", available),
        (
            "unavailableReplicas",
            (goal.replicas.max(all().map(|set| numbers(set).wished).sum()) - available).max(0),
        ),
    ] {
        if number > 0 {
            obj::set(&mut status, &[field], number);
        }
    }
    let mut conditions = obj::items(deployment, &["status", "conditions"]).to_vec();
    let is_available = available >= goal.replicas - goal.unavailable;
    let (word, reason, message) = if is_available {
        ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    } else {
        ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    };
    set_condition(&mut conditions, "Available", word, reason, message);
    let is_complete = updated == goal.replicas && replicas == goal.replicas && available >= goal.replicas;
    let set_name = current.map_or("", obj::name);
    let mut is_waiting = false;
    if is_complete {
        let message = format!("ReplicaSet \"{set_name}\" has successfully progressed.");
        set_condition(&mut conditions, "Progressing", "True", "NewReplicaSetAvailable", &message);
    } else if progress_changed(deployment, &status) || !is_rolling(&conditions) {
        let message = format!("ReplicaSet \"{set_name}\" is progressing.");
        conditions.retain(|one| obj::text(one, &["type"]) != "Progressing");
        set_condition(&mut conditions, "Progressing", "True", "ReplicaSetUpdated", &message);
        is_waiting = true;
    } else if is_late(deployment, &conditions) {
        let message = format!("ReplicaSet \"{set_name}\" has timed out progressing.");
        set_condition(&mut conditions, "Progressing", "False", "ProgressDeadlineExceeded", &message);
    } else {
        is_waiting = true;
    }
    obj::set(&mut status, &["conditions"], conditions);
    let resource = cluster.resource("apps", "deployments")?;
    cluster.set_status(&resource, deployment, &status)?;
    Ok(is_waiting)
}

fn is_rolling(conditions: &[Value]) -> bool {
    conditions.iter().any(|one| {
        obj::text(one, &["type"]) == "Progressing"
            && ["ReplicaSetUpdated", "ProgressDeadlineExceeded"].contains(&obj::text(one, &["reason"]))
    })
}

fn progress_changed(deployment: &Value, status: &Value) -> bool {
    ["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"]
        .iter()
        .any(|field| obj::at(deployment, &["status", field]) != status.get(field))
}

fn is_late(deployment: &Value, conditions: &[Value]) -> bool {
    let limit = obj::int(deployment, &["spec", "progressDeadlineSeconds"]).unwrap_or(600);
    let since = conditions
        .iter()
        .find(|one| obj::text(one, &["type"]) == "Progressing")
        .and_then(|one| obj::text(one, &["lastUpdateTime"]).parse::<jiff::Timestamp>().ok());
    since.is_some_and(|since| jiff::Timestamp::now().duration_since(since).as_secs() > limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(wished: i64, available: i64) -> SetNumbers {
        SetNumbers { wished, available }
    }

    #[test]
    fn first_rollout_goes_to_full_size() {
        let goal = Goal { replicas: 3, surge: 1, unavailable: 0 };
        assert_eq!(roll(goal, set(0, 0), &[]), (3, vec![]));
    }

    #[test]
    fn surge_then_replace_one_by_one() {
        let goal = Goal { replicas: 2, surge: 1, unavailable: 0 };
        // One more, none may go before it is available.
        assert_eq!(roll(goal, set(0, 0), &[set(2, 2)]), (1, vec![2]));
        assert_eq!(roll(goal, set(1, 0), &[set(2, 2)]), (1, vec![2]));
        assert_eq!(roll(goal, set(1, 1), &[set(2, 2)]), (1, vec![1]));
        assert_eq!(roll(goal, set(1, 1), &[set(1, 1)]), (2, vec![1]));
        assert_eq!(roll(goal, set(2, 2), &[set(1, 1)]), (2, vec![0]));
    }

    #[test]
    fn broken_old_pods_go_first() {
        let goal = Goal { replicas: 2, surge: 1, unavailable: 0 };
        assert_eq!(roll(goal, set(1, 0), &[set(2, 1)]).1, vec![2]);
        let goal = Goal { replicas: 2, surge: 1, unavailable: 1 };
        assert_eq!(roll(goal, set(0, 0), &[set(2, 1)]).1, vec![1]);
    }

    #[test]
    fn scaling_down_the_current_set() {
        let goal = Goal { replicas: 1, surge: 1, unavailable: 0 };
        assert_eq!(roll(goal, set(3, 3), &[]).0, 1);
    }
}
