import {
  Divider,
  Dropdown,
  DropdownGroup,
  DropdownItem,
  DropdownList,
  Masthead,
  MastheadBrand,
  MastheadContent,
  MastheadMain,
  MastheadToggle,
  MenuToggle,
  Nav,
  NavItem,
  NavList,
  Page,
  PageSidebar,
  PageSidebarBody,
  PageToggleButton,
  SkipToContent,
} from "@patternfly/react-core";
import { BarsIcon } from "@patternfly/react-icons/dist/esm/icons/bars-icon";
import { UserIcon } from "@patternfly/react-icons/dist/esm/icons/user-icon";
import { type ReactNode, useEffect, useState } from "react";
import { isOver, jobs } from "../state/jobs";
import { live } from "../state/live";
import { actAs, logOut, type Session } from "../state/session";
import { useStore } from "../state/store";
import { shortUid } from "../ui/format";
import { go, href, useRoute } from "../ui/route";
import { setTheme, type Theme, useTheme } from "../ui/theme";
import { ActAs } from "./ActAs";
import { Brand } from "./Brand";

const PLACES: readonly (readonly [route: string, label: string])[] = [
  ["", "Overview"],
  ["volumes", "Volumes"],
  ["library", "ISO library"],
  ["cloud-init", "Cloud-init"],
  ["uploads", "Uploads"],
  ["exports", "Exports"],
  ["jobs", "Jobs"],
  ["bin", "Bin"],
];
const WIDE = window.matchMedia("(min-width: 75rem)");

export function Shell({ session, children }: { session: Session; children: ReactNode }): ReactNode {
  const [place] = useRoute();
  const [open, setOpen] = useState(WIDE.matches);
  useEffect(() => {
    const follow = (): void => setOpen(WIDE.matches);
    WIDE.addEventListener("change", follow);
    return () => WIDE.removeEventListener("change", follow);
  }, []);
  useEffect(() => {
    if (!WIDE.matches) setOpen(false);
  }, [place]);
  const masthead = (
    <Masthead display={{ default: "inline" }}>
      <MastheadMain>
        <MastheadToggle>
          <PageToggleButton
            variant="plain"
            aria-label="Navigation"
            aria-expanded={open}
            isSidebarOpen={open}
            onSidebarToggle={() => setOpen(!open)}
          >
            <BarsIcon />
          </PageToggleButton>
        </MastheadToggle>
        <MastheadBrand>
          <Brand />
        </MastheadBrand>
      </MastheadMain>
      <MastheadContent>
        <div className="es-masthead">
          <Liveness />
          <RunningJobs />
          <UserMenu session={session} />
        </div>
      </MastheadContent>
    </Masthead>
  );
  const sidebar = (
    <PageSidebar isSidebarOpen={open} inert={!open} className={open ? "pf-m-expanded" : ""}>
      <PageSidebarBody>
        <Nav aria-label="Main">
          <NavList>
            {PLACES.map(([route, label]) => (
              <NavItem key={route} to={href(route)} isActive={(place ?? "") === route}>
                {label}
              </NavItem>
            ))}
          </NavList>
        </Nav>
      </PageSidebarBody>
    </PageSidebar>
  );
  return (
    <Page
      masthead={masthead}
      sidebar={sidebar}
      mainContainerId="main"
      isContentFilled
      skipToContent={
        <SkipToContent
          href="#main"
          onClick={(event) => {
            event.preventDefault();
            document.getElementById("main")?.focus();
          }}
        >
          Skip to content
        </SkipToContent>
      }
    >
      {children}
    </Page>
  );
}

function Liveness(): ReactNode {
  const isLive = useStore(live);
  return (
    <span role="status" className={isLive ? "es-live es-live-on" : "es-live"} data-live={isLive}>
      <span className="es-live-text">{isLive ? "Live" : "Connecting…"}</span>
    </span>
  );
}

function RunningJobs(): ReactNode {
  const running = [...useStore(jobs).values()].filter((job) => !isOver(job)).length;
  if (running === 0) return null;
  return (
    <a href={href("jobs")} className="es-running">
      {running} {running === 1 ? "job" : "jobs"}
    </a>
  );
}

function UserMenu({ session }: { session: Session }): ReactNode {
  const [open, setOpen] = useState(false);
  const [choosing, setChoosing] = useState(false);
  const theme = useTheme();
  const { who, acting } = session;
  const trusted = who.client === null;
  const name = acting !== null ? `As ${shortUid(acting)}` : trusted ? "Trusted" : who.role === "admin" ? "Admin" : "User";
  const themes: readonly (readonly [Theme, string])[] = [
    ["system", "As the system"],
    ["light", "Light"],
    ["dark", "Dark"],
  ];
  return (
    <>
      <Dropdown
        isOpen={open}
        onOpenChange={setOpen}
        onSelect={() => setOpen(false)}
        popperProps={{ position: "right", appendTo: "inline" }}
        toggle={(ref) => (
          <MenuToggle ref={ref} isExpanded={open} onClick={() => setOpen(!open)} icon={<UserIcon />} variant="plainText">
            <span className="es-who">{name}</span>
          </MenuToggle>
        )}
      >
        <DropdownGroup label={who.client === null ? "No token is needed here" : `Client ${shortUid(who.client)}`}>
          <DropdownList>
            {who.role === "admin" && <DropdownItem onClick={() => setChoosing(true)}>Act as a client…</DropdownItem>}
            {acting !== null && <DropdownItem onClick={() => actAs(null)}>See everybody’s volumes</DropdownItem>}
            {!trusted && <DropdownItem onClick={leave}>Log out</DropdownItem>}
          </DropdownList>
        </DropdownGroup>
        <Divider component="li" />
        <DropdownGroup label="Colours">
          <DropdownList>
            {themes.map(([value, label]) => (
              <DropdownItem key={value} isSelected={theme === value} onClick={() => setTheme(value)}>
                {label}
              </DropdownItem>
            ))}
          </DropdownList>
        </DropdownGroup>
        <Divider component="li" />
        <DropdownList>
          <DropdownItem to="/schema">Description of the API</DropdownItem>
        </DropdownList>
      </Dropdown>
      {choosing && <ActAs acting={acting} onClose={() => setChoosing(false)} />}
    </>
  );
}

function leave(): void {
  logOut();
  go("");
}
