//! Which resources are served: the built-in ones and those of custom resource definitions.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use super::schema::Schema;

/// Storage identity of a resource: versions and aliases of one resource share it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupResource {
    /// API group, empty for core.
    pub group: String,
    /// Plural name.
    pub resource: String,
}

impl GroupResource {
    /// From its two parts.
    pub fn new(group: &str, resource: &str) -> Self {
        Self { group: group.to_owned(), resource: resource.to_owned() }
    }
}

/// Paths of a scale subresource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalePaths {
    /// JSON path of the wished number.
    pub spec: String,
    /// JSON path of the observed number.
    pub status: String,
    /// JSON path of the selector text, if the status has one.
    pub selector: Option<String>,
}

/// A column of `kubectl get`.
#[derive(Debug, Clone)]
pub struct PrinterColumn {
    /// Heading.
    pub name: String,
    /// OpenAPI type: string, integer, number, boolean, date.
    pub kind: String,
    /// Format, often empty.
    pub format: String,
    /// Help text.
    pub description: String,
    /// 0 is always shown, others only with `-o wide`.
    pub priority: i64,
    /// Path of the value.
    pub path: super::table::jsonpath::JsonPath,
}

/// One served resource in one version.
#[derive(Debug, Clone)]
pub struct Resource {
    /// API group, empty for core.
    pub group: String,
    /// Version.
    pub version: String,
    /// Plural name.
    pub plural: String,
    /// Singular name.
    pub singular: String,
    /// Kind.
    pub kind: String,
    /// Kind of lists.
    pub list_kind: String,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Short names for `kubectl`.
    pub short_names: Vec<String>,
    /// Categories such as `all`.
    pub categories: Vec<String>,
    /// Whether there is a status subresource.
    pub status: bool,
    /// Scale subresource, if any.
    pub scale: Option<ScalePaths>,
    /// Further subresources: name, kind, verbs.
    pub subresources: Vec<(&'static str, &'static str, &'static [&'static str])>,
    /// Where objects are stored.
    pub storage: GroupResource,
    /// Schema of the objects.
    pub schema: Arc<Schema>,
    /// The schema as a custom resource definition has it; null for built-in kinds.
    pub raw_schema: serde_json::Value,
    /// Whether the resource comes from a custom resource definition.
    pub custom: bool,
    /// Printer columns of a custom resource.
    pub columns: Vec<PrinterColumn>,
}

impl Resource {
    /// The schema that stored objects follow: events are stored in the core form.
    pub fn schema_for_storage(&self) -> Arc<Schema> {
        if self.group == "events.k8s.io" {
            super::schema::builtin::schema("io.k8s.api.core.v1.Event")
        } else {
            self.schema.clone()
        }
    }

    /// `group/version` or `v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }
}

/// Everything that is served.
#[derive(Debug, Default)]
pub struct Registry {
    served: RwLock<BTreeMap<(String, String, String), Arc<Resource>>>,
    changes: std::sync::atomic::AtomicU64,
}

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<(String, String, String), Arc<Resource>>> {
        self.served.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<(String, String, String), Arc<Resource>>> {
        self.served.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Serves a resource, replacing what had its place.
    pub fn add(&self, resource: Resource) {
        let key = (resource.group.clone(), resource.version.clone(), resource.plural.clone());
        self.write().insert(key, Arc::new(resource));
        self.changes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// Stops serving all versions of a custom resource.
    pub fn remove(&self, group: &str, plural: &str) {
        self.write().retain(|_, one| !(one.custom && one.group == group && one.plural == plural));
    }

    /// How often a resource was added.
    pub fn generation(&self) -> u64 {
        self.changes.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// A resource by its path parts.
    pub fn get(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.read().get(&(group.to_owned(), version.to_owned(), plural.to_owned())).cloned()
    }

    /// A resource by group and plural name in any version.
    pub fn any_version(&self, group: &str, plural: &str) -> Option<Arc<Resource>> {
        self.read().values().find(|one| one.group == group && one.plural == plural).cloned()
    }

    /// A resource by `apiVersion` and kind.
    pub fn by_kind(&self, api_version: &str, kind: &str) -> Option<Arc<Resource>> {
        self.read().values().find(|one| one.kind == kind && one.api_version() == api_version).cloned()
    }

    /// All resources, ordered by group, version, plural name.
    pub fn all(&self) -> Vec<Arc<Resource>> {
        self.read().values().cloned().collect()
    }

    /// Resources of one group and version.
    pub fn of_version(&self, group: &str, version: &str) -> Vec<Arc<Resource>> {
        self.read().values().filter(|one| one.group == group && one.version == version).cloned().collect()
    }

    /// Each group (core excluded) with its versions, the preferred one first.
    pub fn groups(&self) -> BTreeMap<String, Vec<String>> {
        let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for one in self.read().values().filter(|one| !one.group.is_empty()) {
            let versions = groups.entry(one.group.clone()).or_default();
            if !versions.contains(&one.version) {
                versions.push(one.version.clone());
            }
        }
        for versions in groups.values_mut() {
            versions.sort_by_key(|version| std::cmp::Reverse(version_rank(version)));
        }
        groups
    }
}

/// Order of versions as Kubernetes has it: GA over beta over alpha, then by number.
fn version_rank(version: &str) -> (u8, u32, u32) {
    let Some(rest) = version.strip_prefix('v') else {
        return (0, 0, 0);
    };
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
    let major = digits(rest);
    let tail = &rest[major.len()..];
    let stability = match tail {
        "" => 3,
        _ if tail.starts_with("beta") => 2,
        _ if tail.starts_with("alpha") => 1,
        _ => return (0, 0, 0),
    };
    let minor = tail.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    (stability, major.parse().unwrap_or(0), minor.parse().unwrap_or(0))
}
