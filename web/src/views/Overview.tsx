import {
  Card,
  CardBody,
  CardHeader,
  CardTitle,
  Content,
  EmptyState,
  EmptyStateBody,
  Gallery,
  Label,
  Skeleton,
} from "@patternfly/react-core";
import { lazy, type ReactNode, Suspense } from "react";
import { call } from "../api/client";
import type { Location } from "../api/types";
import { isOver, jobs } from "../state/jobs";
import type { Session } from "../state/session";
import { useResource } from "../state/resource";
import { useStore } from "../state/store";
import { volumes } from "../state/volumes";
import { Bar } from "../ui/Bar";
import { bytes, number } from "../ui/format";
import { href } from "../ui/route";
import { JobLine } from "../ui/JobLine";
import { View } from "../ui/View";
import { Alert } from "../ui/Note";

const EVERY_MS = 10_000;

const Charts = lazy(() => import("./Charts"));

export function Overview({ session }: { session: Session }): ReactNode {
  const isAdmin = session.who.role === "admin";
  return (
    <View title="Overview">
      <div className="es-stack">
        <Health isAdmin={isAdmin} />
        <Figures />
        {isAdmin && <Locations />}
        {isAdmin && (
          <Suspense fallback={null}>
            <Charts />
          </Suspense>
        )}
        <Running />
      </div>
    </View>
  );
}

function Health({ isAdmin }: { isAdmin: boolean }): ReactNode {
  const health = useResource(() => call("health", {}), "health", EVERY_MS);
  if (health.error !== null) return <Alert variant="danger" title={health.error} />;
  if (health.value === undefined) return <Skeleton height="3rem" screenreaderText="Asking how the server is" />;
  if (health.value.status === "ok") return <Alert variant="success" title="All is well" />;
  if (!isAdmin) {
    return (
      <Alert variant="warning" title="Something is not well">
        An administrator is told what.
      </Alert>
    );
  }
  const { problems } = health.value;
  return (
    <Alert variant="warning" title={problems.length === 1 ? "One thing is not well" : "Some things are not well"}>
      <ul className="es-problems">
        {problems.map((problem) => (
          <li key={problem}>{problem}</li>
        ))}
      </ul>
    </Alert>
  );
}

function Figures(): ReactNode {
  const { byId, loading } = useStore(volumes);
  const all = [...byId.values()];
  const running = [...useStore(jobs).values()].filter((job) => !isOver(job)).length;
  const figures: readonly (readonly [string, string, string])[] = [
    ["Volumes", number(all.length), "volumes"],
    ["Exported", number(all.filter((volume) => volume.exported).length), "exports"],
    ["Size of all", bytes(all.reduce((sum, volume) => sum + volume.size, 0)), "volumes"],
    ["Taken on disk", bytes(all.reduce((sum, volume) => sum + volume.sizeOnDisk, 0)), "volumes"],
    ["Running jobs", number(running), "jobs"],
  ];
  return (
    <ul className="es-figures">
      {figures.map(([label, value, route]) => (
        <li key={label}>
          <a href={href(route)} className="es-figure">
            <span className="es-figure-value">{loading ? "…" : value}</span>
            <span className="es-figure-label">{label}</span>
          </a>
        </li>
      ))}
    </ul>
  );
}

function Locations(): ReactNode {
  const locations = useResource(() => call("locations", {}), "locations", EVERY_MS);
  return (
    <section aria-labelledby="locations">
      <Content component="h2" id="locations">
        Locations
      </Content>
      {locations.error !== null && <Alert variant="danger" title={locations.error} />}
      {locations.value?.length === 0 && (
        <EmptyState titleText="No location yet" headingLevel="h3">
          <EmptyStateBody>
            A directory below the server’s root becomes one by a file <code>settings.json</code>; <code>{"{}"}</code> will do.
          </EmptyStateBody>
        </EmptyState>
      )}
      <Gallery hasGutter minWidths={{ default: "min(100%, 22rem)" }}>
        {locations.value?.map((location) => <LocationCard key={location.name} location={location} />)}
      </Gallery>
    </section>
  );
}

function LocationCard({ location }: { location: Location }): ReactNode {
  const total = location.total_bytes;
  const used = total !== null && location.free_bytes !== null ? total - location.free_bytes : null;
  const quota = location["max-total-size"];
  const most = location["max-volumes"];
  return (
    <Card isCompact>
      <CardHeader
        actions={{
          actions: (
            <Label status={location.usable ? "success" : "danger"}>{location.usable ? "Usable" : "Not usable"}</Label>
          ),
          hasNoOffset: true,
        }}
      >
        <CardTitle component="h3">{location.name}</CardTitle>
      </CardHeader>
      <CardBody>
        <div className="es-stack es-stack-tight">
          {location.reason !== null && <Alert variant="danger" isPlain title={location.reason} />}
          <Meter
            title="File system"
            value={used}
            most={total}
            words={`${bytes(location.free_bytes)} free of ${bytes(total)}`}
          />
          <Meter
            title="Quota"
            value={location.virtual_bytes}
            most={quota}
            words={quota === null ? `${bytes(location.virtual_bytes)}, no limit` : `${bytes(location.virtual_bytes)} of ${bytes(quota)}`}
          />
          <Meter
            title="Volumes"
            value={location.volumes}
            most={most}
            words={most === null ? `${number(location.volumes)}, no limit` : `${number(location.volumes)} of ${number(most)}`}
          />
          {location.odd.length > 0 && (
            <Alert variant="warning" isPlain title={`${location.odd.length} directories look like volumes and are none`}>
              <ul>
                {location.odd.slice(0, 5).map((one) => (
                  <li key={one.directory}>
                    {one.directory}: {one.reason}
                  </li>
                ))}
              </ul>
            </Alert>
          )}
          <Content component="small" className="es-muted es-path">
            {location.path}
          </Content>
        </div>
      </CardBody>
    </Card>
  );
}

function Meter(props: { title: string; value: number | null; most: number | null; words: string }): ReactNode {
  const { title, value, most, words } = props;
  if (value === null || most === null || most === 0) {
    return (
      <div className="es-meter">
        <span>{title}</span>
        <span className="es-muted">{words}</span>
      </div>
    );
  }
  const fraction = value / most;
  return (
    <Bar
      title={title}
      label={title}
      told={words}
      fraction={fraction}
      variant={fraction >= 0.95 ? "danger" : fraction >= 0.85 ? "warning" : undefined}
    />
  );
}

function Running(): ReactNode {
  const shown = [...useStore(jobs).values()].filter((job) => !isOver(job));
  return (
    <section aria-labelledby="running">
      <Content component="h2" id="running">
        Running jobs
      </Content>
      {shown.length === 0 ? (
        <Content component="p" className="es-muted">
          None. <a href={href("jobs")}>What ran of late</a>
        </Content>
      ) : (
        <ul className="es-stack">
          {shown.map((job) => (
            <li key={job.job}>
              <JobLine job={job} />
            </li>
          ))}
        </ul>
      )}
    </section>
  );
}
